"""What all latent-variable models share: the bound and its importance-weighted form, samples, networks by name."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import dgm_kernels
from dgm_kernels import NoiseKey, noise_like

from ..autoregressive.base import check_shape
from ..model import (
    DensityUnavailable,
    GenerativeModel,
    Stream,
    check_number,
    check_positive,
    check_positive_number,
)
from .networks import NETWORKS, ConvDecoder, ConvEncoder, Dense
from .observation import Observation

POSTERIORS = ("diagonal", "full")
_ROWS = 8192  # draws of the latent variable, of all samples together, that a bound works on at a time


class Posterior(NamedTuple):
    """The Gaussian ``q(u | x)``: its mean ``[batch, D]``, and one of the two.

    Attributes:
        mu: the mean.
        log_var: logarithm of the variances, ``[batch, D]``; None with full covariances.
        scale_tril: lower triangular factors of full covariances, ``[batch, D, D]``; else None.
    """

    mu: Tensor
    log_var: Tensor | None = None
    scale_tril: Tensor | None = None


class LatentVariable(GenerativeModel):
    """``p(x) = integral p(z) p(x | z) dz`` with z in D dimensions, and an encoder ``q(z | x)`` that makes it tractable.

    This is the base class of the families, and no model by itself: a family is a subclass whose arguments are JSON
    values (see :class:`.GenerativeModel`). The prior is the standard normal distribution of ``u``, and z is u, or a
    function of it that has an inverse (:meth:`latents`): all ratios of densities are then those of u.

    Args:
        image_shape: of one sample, channels first.
        latent: D.
        network: ``"dense"`` or ``"conv"``.
        hidden: sizes of the hidden layers of dense networks, those of the decoder the other way round.
        width: features of convolutional networks at full resolution.
        depth: number of halvings in convolutional networks.
        dropout: share of the hidden units that is dropped in training.
        posterior: ``"diagonal"`` or ``"full"``: the covariance of q.
        output, levels, mixtures: see :class:`.Observation`.
        num_classes: classes to condition encoder and decoder on; None for none.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        latent: int,
        network: str,
        hidden: Sequence[int],
        width: int,
        depth: int,
        dropout: float,
        posterior: str,
        output: str | None,
        levels: int | None,
        mixtures: int,
        num_classes: int | None,
    ) -> None:
        super().__init__()
        self.sample_shape, self.latent = check_shape(image_shape), check_positive("latent", latent)
        if posterior not in POSTERIORS:
            raise ValueError(f"posterior must be one of {', '.join(POSTERIORS)}, got {posterior!r}")
        if network not in NETWORKS:
            raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {network!r}")
        self.covariance, self.levels, self.num_classes = posterior, levels, num_classes
        self.conditional = num_classes is not None
        classes = 0 if num_classes is None else check_positive("num_classes", num_classes)
        self.observation = Observation(self.sample_shape, output, levels, mixtures)
        outputs = 2 * latent if posterior == "diagonal" else latent * (latent + 3) // 2
        shape = self.observation.parameters_shape
        options: dict[str, Any] = {"classes": classes, "dropout": dropout}
        self.encoder: nn.Module
        self.decoder: nn.Module
        if network == "dense":
            self.encoder = Dense(self.elements, hidden, (outputs,), **options)
            self.decoder = Dense(latent, tuple(reversed(hidden)), shape, **options)
        else:
            self.encoder = ConvEncoder(self.sample_shape, width, depth, outputs, **options)
            self.decoder = ConvDecoder(latent, self.sample_shape, shape[0], width, depth, **options)

    @property
    def elements(self) -> int:
        """Numbers in one sample."""
        return math.prod(self.sample_shape)

    def posterior(self, x: Tensor, cond: Tensor | None = None) -> Posterior:
        """The Gaussian ``q(u | x)`` of the encoder."""
        outputs = self.encoder(x, cond)
        mu, rest = outputs[:, : self.latent], outputs[:, self.latent :]
        if self.covariance == "diagonal":
            return Posterior(mu, log_var=rest)
        rows, columns = torch.tril_indices(self.latent, self.latent, -1, device=x.device)
        below = torch.zeros(len(x), self.latent, self.latent, dtype=rest.dtype, device=rest.device)
        below = below.index_put((torch.arange(len(x), device=x.device)[:, None], rows, columns), rest[:, self.latent :])
        return Posterior(mu, scale_tril=below + torch.diag_embed(torch.exp(0.5 * rest[:, : self.latent])))

    def latents(self, u: Tensor) -> Tensor:
        """The latent variable z as a function of u, which is Gaussian."""
        return u

    def decode(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        """Parameters of ``p(x | z)``, as ``observation`` takes them, ``[batch, ...]`` from ``[batch, D]``."""
        return self.decoder(z, cond)

    def loss_parts(self, x: Tensor, cond: Tensor | None = None, *, key: NoiseKey | None = None) -> dict[str, Tensor]:
        """The terms of the negative bound, in nats for each element of a sample."""
        # Looking at the values of a tensor on another device would wait for it.
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_data(x)
        else:
            self._check_batch(x)
        cond = self._check_classes(cond, x.shape[0])
        key = NoiseKey.draw(device=x.device) if key is None else key
        parts = self._loss_parts(x, cond, dataclasses.replace(key, stream=Stream.TRAINING_NOISE))
        return {name: part.mean() / self.elements for name, part in parts.items()}

    @abstractmethod
    def _loss_parts(self, x: Tensor, cond: Tensor | None, key: NoiseKey) -> dict[str, Tensor]:
        """The same in nats, ``[batch]`` each."""

    def _draw(self, posterior: Posterior, key: NoiseKey, free_bits: float = 0.0) -> tuple[Tensor, Tensor]:
        """One z of each sample, ``[batch, D]``, and ``KL(q || p)`` in nats, ``[batch]``."""
        if posterior.scale_tril is not None:
            u, kl = dgm_kernels.gaussian_sample_kl(posterior.mu, noise=key, scale_tril=posterior.scale_tril)
        else:
            u, kl = dgm_kernels.gaussian_sample_kl(posterior.mu, posterior.log_var, key, free_bits=free_bits)
        return self.latents(u), kl

    def log_weights(self, x: Tensor, cond: Tensor | None, k: int, key: NoiseKey) -> Tensor:
        """``log p(x, z_j) - log q(z_j | x)`` of k draws from q, ``[k, batch]``; draw j has the noise of step + j."""
        u, log_ratio = self._importance(self.posterior(x, cond), k, key)
        return log_ratio + self._log_likelihood(x, self.latents(u), cond)

    def _importance(self, posterior: Posterior, k: int, key: NoiseKey) -> tuple[Tensor, Tensor]:
        """k draws of u, ``[k, batch, D]``, and ``log p(u) - log q(u | x)``, ``[k, batch]``."""
        mu, log_var, scale_tril = posterior
        if log_var is not None:
            return dgm_kernels.importance_log_weights(mu, log_var, key, samples=k)
        assert scale_tril is not None
        noise = torch.stack([noise_like(mu, _later(key, draw)) for draw in range(k)])
        u = mu + (scale_tril @ noise[..., None])[..., 0]
        logdet = scale_tril.diagonal(dim1=1, dim2=2).log().sum(1)
        return u, logdet + 0.5 * (noise.square() - u.square()).sum(2)

    def _log_likelihood(self, x: Tensor, z: Tensor, cond: Tensor | None) -> Tensor:
        """``log p(x | z)`` of draws ``z [k, batch, D]``, ``[k, batch]``."""
        k, batch = z.shape[:2]
        cond = None if cond is None else cond.repeat(k)
        outputs = self.decode(z.flatten(0, 1).to(x.dtype), cond)
        repeated = x.expand(k, *x.shape).flatten(0, 1)
        return self.observation.log_prob(repeated, outputs).view(k, batch)

    def log_prob(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Never: see the error."""
        raise DensityUnavailable(
            f"{self.model_name} has no density in closed form: it is an integral over all latent variables, through a "
            "decoder that is not linear; elbo(x, k) bounds it from below, the more tightly the larger k"
        )

    @torch.no_grad()
    def elbo(
        self, x: Tensor, k: int = 1, cond: Tensor | None = None, *, seed: int = 0, first_sample: int = 0
    ) -> Tensor:
        """A random lower bound of the log-likelihood in nats, ``[batch]``.

        For k = 1 ``log p(x | z) - KL(q(z | x) || p(z))``, with z drawn from q; for k > 1 the logarithm of the mean of
        ``p(x, z_j) / q(z_j | x)`` over k draws. On average it rises with k, to the log-likelihood itself. Neither
        ``beta`` nor free bits have a part in it.

        Args:
            x: ``[batch, *image_shape]``; on the grey levels unless ``levels`` is None (then it bounds the log-density).
            k: draws of the latent variable.
            cond: int64 ``[batch]``, the classes, if the model has any.
            seed, first_sample: name the noise, as in ``sample``.

        Source: Kingma and Welling, 2014; for k > 1 Burda et al., "Importance weighted autoencoders", 2016.
        """
        k = check_positive("k", k)
        self._check_data(x)
        cond = self._check_classes(cond, x.shape[0])
        key = NoiseKey(seed, first_sample, stream=Stream.BOUND)
        with self._evaluating():
            if k == 1:
                z, kl = self._draw(self.posterior(x, cond), key)
                return self._log_likelihood(x, z[None], cond)[0] - kl
            parts = _parts(k, len(x))
            weights = [self.log_weights(x, cond, len(draws), key.at(draws[0])) for draws in parts]
            return dgm_kernels.importance_bound(torch.cat(weights))

    @torch.no_grad()
    def naive_bound(
        self, x: Tensor, k: int = 1, cond: Tensor | None = None, *, seed: int = 0, first_sample: int = 0
    ) -> Tensor:
        """``log mean_j p(x | z_j)`` with k draws z_j from the prior, ``[batch]``: a lower bound on average too.

        Few draws from the prior come near a z that explains x, so its variance is much larger than that of
        :meth:`elbo`, and it lies as much lower. Arguments as in :meth:`elbo`.
        """
        k = check_positive("k", k)
        self._check_data(x)
        cond = self._check_classes(cond, x.shape[0])
        key = NoiseKey(seed, first_sample, stream=Stream.BOUND)
        like = x.new_empty(len(x), self.latent)
        with self._evaluating():
            parts = []
            for draws in _parts(k, len(x)):
                z = self.latents(torch.stack([noise_like(like, key.at(draw)) for draw in draws]))
                parts.append(self._log_likelihood(x, z, cond))
            return dgm_kernels.importance_bound(torch.cat(parts))

    def _sample(  # type: ignore[override]
        self, n: int, seed: int, cond: Tensor | None, first_sample: int, *, temperature: float = 1.0
    ) -> Tensor:
        """z from the prior, then x given z.

        Args:
            n, seed, cond, first_sample: see ``sample``.
            temperature: factor on the noise of z, positive; less than 1 stays nearer to the mode of the prior.
        """
        temperature = check_positive_number("temperature", temperature)
        cond = self._check_classes(cond, n)
        like = torch.empty(n, self.latent, device=self.device, dtype=self.dtype)
        u = temperature * noise_like(like, NoiseKey(seed, first_sample, stream=Stream.INITIAL_STATE))
        return self.observation.sample(self.decode(self.latents(u), cond), NoiseKey(seed, first_sample))


def check_weight(name: str, value: float) -> float:
    """``value`` if it is a finite number that is not negative, else an error."""
    if not 0 <= check_number(name, value) < math.inf:
        raise ValueError(f"{name} must be a finite number that is not negative, got {value!r}")
    return value


def _parts(k: int, batch: int) -> list[range]:
    """The numbers of k draws, some at a time."""
    size = max(_ROWS // max(batch, 1), 1)
    return [range(start, min(start + size, k)) for start in range(0, k, size)]


def _later(key: NoiseKey, draw: int) -> NoiseKey:
    return key if draw == 0 else key.at(key.step + draw)
