"""The convolutional network of DQN (Nature 518.7540, 2015) with normalization by keyword.

    PPO("CnnPolicy", env, policy_kwargs={
        "features_extractor_class": NatureCNN,
        "features_extractor_kwargs": {"use_batch_norm": True},
    })
    PPO(CnnPolicy, env)  # the library's CnnPolicy with this network, faster still

Off, which is the default, it is Stable-Baselines3's own: the same parameters, names, initial
values, random draws and outputs (to rounding), so that models load both ways; it only computes
with the channels last in memory and, on AMD's CPUs, its large products through oneDNN: faster.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common import torch_layers as library
from stable_baselines3.common.policies import ActorCriticCnnPolicy
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, is_image_space
from torch import Tensor, nn
from torch.nn import functional

from batchproof import cpu
from batchproof.errors import BatchproofError
from batchproof.layers import create_norm
from batchproof.layers.functional import one_of

AUTOCAST = {"bfloat16": torch.bfloat16}
"""The types, other than the parameters' own, that the layers can compute in."""


class _TakenForTheLibrarys(type(nn.Module)):  # type: ignore[misc]
    """Equal to the library's NatureCNN: its policies ask for that class by ``==``.

    They leave out their own hidden layers behind it (``net_arch=[]``), and put two behind every
    other extractor, a subclass included.
    """

    def __eq__(cls, other: object) -> bool:
        return other is library.NatureCNN or cls is other

    __hash__ = type.__hash__


class NatureCNN(library.NatureCNN, metaclass=_TakenForTheLibrarys):
    """Three convolutions and a linear layer: images (B, C, H, W) to features (B, features_dim).

    Each convolution becomes Conv2d - norm - ReLU; the linear layer stays as it is. For
    ``CnnPolicy``; `CombinedExtractor` is for ``MultiInputPolicy``.

    Args:
        observation_space: images, channels first.
        features_dim: features that come out.
        normalized_image: whether images arrive as numbers that need no division by 255.
        use_batch_norm: short for ``norm="batch"``.
        norm: a name in `batchproof.layers.LAYERS`; ``none`` and None are off.
        norm_options: keywords of the norm's constructor, for example ``{"momentum": 0.01}``.
        autocast: ``bfloat16`` computes convolutions and linear layer in it, on a CPU that has
            instructions for it; parameters, norms and the features stay float32.

    Warns:
        UserWarning: ``autocast`` without a GPU on a CPU that emulates it, many times slower.

    Raises:
        BatchproofError: ``use_batch_norm`` beside another norm, an unknown norm, option or type.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        features_dim: int = 512,
        normalized_image: bool = False,
        use_batch_norm: bool = False,
        norm: str | None = None,
        norm_options: Mapping[str, Any] | None = None,
        autocast: str | None = None,
    ) -> None:
        chosen = _chosen(use_batch_norm, norm)
        if norm_options and chosen == "none":
            raise BatchproofError("norm_options are for a norm: give norm, for example 'batch'")
        if autocast is not None:
            one_of("autocast", autocast, tuple(AUTOCAST))
            _warn_if_slow(autocast)
        super().__init__(observation_space, features_dim, normalized_image)
        self.norm = chosen
        self.autocast = autocast
        self.linear[0] = _LinearLikeConvolution.sharing(self.linear[0])
        if chosen != "none":
            self.cnn = _normalized(self.cnn, chosen, norm_options)

    def forward(self, observations: Tensor) -> Tensor:
        """Features (B, features_dim) of images (B, C, H, W)."""
        images = observations.contiguous(memory_format=torch.channels_last)
        if self.autocast is None:
            return self.linear(self.cnn(images))
        with torch.autocast(images.device.type, AUTOCAST[self.autocast]):
            return self.linear(self.cnn(images)).float()


class _LinearLikeConvolution(nn.Linear):
    """A linear layer that an AMD CPU's training computes as a convolution: through oneDNN.

    torch sends float32 products to MKL, which reaches less than half of oneDNN's rate there
    (158 of 380 GFLOP/s on two cores of an EPYC with AVX-512). Rows are the pixels of one image,
    with the channels last, so that nothing is copied.
    """

    FEWEST_ROWS = 64  # below, the product is too small to matter

    @classmethod
    def sharing(cls, linear: Any) -> nn.Linear:
        """The same layer with the same parameters; no random number is drawn."""
        layer = nn.utils.skip_init(cls, linear.in_features, linear.out_features, device="cpu")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(B, in) to (B, out)."""
        # Without gradients, as when acting, it stays the library's product to the last bit.
        if (
            not torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled(x.device.type)
            or x.device.type != "cpu"
            or x.dtype != torch.float32
            or len(x) < self.FEWEST_ROWS
            or not mkl_is_slow()
        ):
            return super().forward(x)
        rows, features = x.shape
        image = x.reshape(1, rows, 1, features).permute(0, 3, 1, 2)
        out = functional.conv2d(image, self.weight[:, :, None, None], self.bias)
        return out.permute(0, 2, 3, 1).reshape(rows, -1)


def mkl_is_slow() -> bool:
    """Whether float32 products go to MKL on a CPU of AMD's, with oneDNN at hand."""
    onednn = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return onednn and cpu.is_amd()


class CombinedExtractor(library.CombinedExtractor):
    """For dict observations: a `NatureCNN` for each image, everything else flattened.

    In place of the library's, for ``MultiInputPolicy``; off, it is the library's own.

    Args:
        observation_space: a dict of spaces.
        cnn_output_dim: features of each image.
        normalized_image: as `NatureCNN`.
        use_batch_norm: as `NatureCNN`.
        norm: as `NatureCNN`.
        norm_options: as `NatureCNN`.
        autocast: as `NatureCNN`.

    Raises:
        BatchproofError: as `NatureCNN`.
    """

    def __init__(
        self,
        observation_space: spaces.Dict,
        cnn_output_dim: int = 256,
        normalized_image: bool = False,
        use_batch_norm: bool = False,
        norm: str | None = None,
        norm_options: Mapping[str, Any] | None = None,
        autocast: str | None = None,
    ) -> None:
        # Not the library's constructor, which would make its own networks and draw for them.
        library.BaseFeaturesExtractor.__init__(self, observation_space, features_dim=1)
        extractors: dict[str, nn.Module] = {}
        total = 0
        for key, space in observation_space.spaces.items():
            if is_image_space(space, normalized_image=normalized_image):
                extractors[key] = NatureCNN(
                    space,
                    cnn_output_dim,
                    normalized_image,
                    use_batch_norm,
                    norm,
                    norm_options,
                    autocast,
                )
                total += cnn_output_dim
            else:
                extractors[key] = nn.Flatten()
                total += get_flattened_obs_dim(space)
        self.extractors = nn.ModuleDict(extractors)
        self._features_dim = total


class CnnPolicy(ActorCriticCnnPolicy):
    """The library's ``CnnPolicy`` of PPO and A2C, with `NatureCNN` and fewer passes over memory.

    In rollouts and updates, images are turned channels last while they are bytes and divided
    straight from bytes; the library converts them first, a pass more, and then `NatureCNN` turns
    four times as many. Adam moves each parameter in one pass (torch's ``fused``). The numbers are
    the same, Adam's to rounding, and models load both ways.

    Args:
        args: the library's.
        kwargs: the library's. Without ``features_extractor_class`` it is `NatureCNN`; without
            ``optimizer_kwargs`` Adam has the library's ``eps`` and is fused.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", NatureCNN)
        if kwargs.get("optimizer_class", torch.optim.Adam) is torch.optim.Adam:
            kwargs.setdefault("optimizer_kwargs", {"eps": 1e-5, "fused": True})
        super().__init__(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # What other algorithms look for first in a policy that was made for them.
        if name in ("actor", "q_net", "quantile_net"):
            raise AttributeError(
                "batchproof.sb3.CnnPolicy is for PPO and A2C: give other algorithms 'CnnPolicy' "
                "with policy_kwargs={'features_extractor_class': batchproof.sb3.NatureCNN}"
            )
        return super().__getattr__(name)

    def extract_features(
        self, obs: Any, features_extractor: library.BaseFeaturesExtractor | None = None
    ) -> Any:
        """Features (B, features_dim) of images (B, C, H, W); without sharing, actor's and critic's.

        Args:
            obs: uint8 images, or anything else, which the library treats as ever.
            features_extractor: another than the policy's own.
        """
        space = self.observation_space
        if (
            features_extractor is not None
            or not self.normalize_images
            or not is_image_space(space)
            or obs.dtype != torch.uint8
        ):
            return super().extract_features(obs, features_extractor)
        # Turned while they are bytes; the quotient is the library's, obs.float() / 255, exactly.
        images = torch.div(obs.contiguous(memory_format=torch.channels_last), 255.0)
        if self.share_features_extractor:
            return self.features_extractor(images)
        return self.pi_features_extractor(images), self.vf_features_extractor(images)


def _warn_if_slow(autocast: str) -> None:
    if cpu.has_bfloat16() is False and not torch.cuda.is_available():
        warnings.warn(
            f"autocast={autocast!r} is many times slower than float32 on this CPU, which has no "
            "instructions for it: leave it out here",
            stacklevel=3,
        )


def _chosen(use_batch_norm: bool, norm: str | None) -> str:
    if use_batch_norm and norm not in (None, "batch"):
        raise BatchproofError(
            f"use_batch_norm=True and norm={norm!r} contradict each other: give norm={norm!r} alone"
        )
    return "batch" if use_batch_norm else norm or "none"


def _normalized(cnn: nn.Sequential, norm: str, options: Mapping[str, Any] | None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for layer in cnn:
        layers.append(layer)
        if isinstance(layer, nn.Conv2d):
            layers.append(create_norm(norm, layer.out_channels, dims=2, **(options or {})))
    return nn.Sequential(*layers)
