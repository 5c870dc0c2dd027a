"""Hadamard transforms on the GPU, to float32 or to quantized activations. Knows nothing of layers.

hadamard.cu does the work where a block of channels has a Sylvester part of 8 or more; hadamard_plain.cu the rest;
swiglu_hadamard.cu what comes from integer sums of many tokens.

Shape suffixes: M tokens, N channels, K channels padded to a multiple of 128, D dense order, R rows of gate and up.
"""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from rcpformat.hadamard import HadamardPlan, hadamard_factor, paley_matrix, sylvester_matrix
from rcpformat.spec import ceil_div
from rcprun.backends.cuda.hadamard_layout import Layout, best_layout, best_whole_layout, sign_words
from rcprun.backends.cuda.launch import NO_HOPPER, PORTABLE_CLUSTER, check, has_hopper, kernel

FEW_TOKENS = 16
"""Up to this many tokens go the way chosen for decoding, more the way chosen for prefill."""
_QUANTIZE_THREADS = 1024
_PLAIN_THREADS = 128
_NOT_QUANTIZED = (None, None, np.int32(0), np.float32(0), np.int32(0))


class Transform:
    """had or its transpose (SPEC.md, "Transforms") of one width, with its constants on the GPU."""

    def __init__(self, n: int, *, transpose: bool = False, rotate: bool = True, hopper: bool = True) -> None:
        """rotate: False for the identity. hopper: False for the way of older GPUs, which they take by themselves."""
        self.n = n
        self._plan = plan = hadamard_factor(n) if rotate else HadamardPlan(n, 1, 1)
        self._norm = np.float32(plan.norm)
        p_DD = np.ascontiguousarray(paley_matrix(plan.m).T if transpose else paley_matrix(plan.m))
        self._paley_DD = cupy.asarray(p_DD)
        self._layouts: dict[bool, tuple[Layout, cupy.ndarray]] = {}
        for few in (True, False):
            layout = best_layout(plan, few=few)
            if layout is not None:
                self._layouts[few] = layout, self._signs(p_DD, layout)
        self._clusters = hopper and has_hopper() and self._cluster_fits()
        self._defines = () if self._clusters else ((NO_HOPPER, 1),)
        whole = best_whole_layout(plan) if rotate else None
        self._whole = (whole, self._signs(p_DD, whole)) if whole else None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        layouts = [*self._layouts.values(), *([self._whole] if self._whole else [])]
        return int(self._paley_DD.nbytes + sum(bits.nbytes for _, bits in layouts))

    @property
    def takes_sums(self) -> bool:
        """Whether there is quantize_swiglu."""
        return self._whole is not None

    def needs_workspace(self, tokens: int) -> bool:
        """Whether quantize needs a workspace for this many tokens, because it takes two kernels."""
        if self._plan.block == 1:
            return False
        layout = self._layouts[tokens <= FEW_TOKENS][0] if self._layouts else None
        return layout is None or self._plan.copies > 1 or (layout.parts > 1 and not self._clusters)

    def apply(self, x_MN: cupy.ndarray, y_MN: cupy.ndarray, *, factor_N: cupy.ndarray | None = None) -> None:
        """y = had(factor ∘ x); all float32, y not x."""
        self._check_input(x_MN, factor_N)
        check(y_MN, "y", np.float32, x_MN.shape)
        plan = self._plan
        if self._layouts:
            self._launch(x_MN, factor_N, y_MN)
            return
        kernel("hadamard_plain", "hadamard_plain", self._defines).launch(
            ceil_div(x_MN.size, _PLAIN_THREADS),
            _PLAIN_THREADS,
            (
                x_MN,
                factor_N,
                self._paley_DD,
                self._norm,
                y_MN,
                np.int64(x_MN.size),
                *map(np.int32, (plan.m, plan.sylvester, plan.copies)),
            ),
            overlap=True,
        )

    def quantize(
        self,
        x_MN: cupy.ndarray,
        codes_MK: cupy.ndarray,
        scale_M: cupy.ndarray,
        *,
        clip: np.float32,
        bits: int,
        factor_N: cupy.ndarray | None = None,
        workspace_MN: cupy.ndarray | None = None,
    ) -> None:
        """Codes (int8, padding left as it is) and scales (float32) of had(factor ∘ x): SPEC.md, "Activations".

        workspace: float32 like x, where needs_workspace.
        """
        self._check_input(x_MN, factor_N)
        check(codes_MK, "codes", np.int8, (len(x_MN), None))
        assert codes_MK.shape[1] >= self.n and codes_MK.shape[1] % 4 == 0, f"codes: {codes_MK.shape[1]} columns"
        check(scale_M, "scale", np.float32, (len(x_MN),))
        if self.needs_workspace(len(x_MN)):
            assert workspace_MN is not None
            self.apply(x_MN, workspace_MN, factor_N=factor_N)
            x_MN, factor_N = workspace_MN, None
        elif self._plan.block > 1:
            quantized = (codes_MK, scale_M, np.int32(codes_MK.shape[1]), clip, np.int32(bits))
            self._launch(x_MN, factor_N, None, quantized)
            return
        kernel("hadamard_plain", "quantize", self._defines).launch(
            len(x_MN),
            _QUANTIZE_THREADS,
            (x_MN, factor_N, codes_MK, scale_M, np.int32(self.n), np.int32(codes_MK.shape[1]), clip, np.int32(bits)),
            overlap=True,
        )

    def quantize_swiglu(
        self,
        sum_MR: cupy.ndarray,
        scale_R: cupy.ndarray,
        bias_R: cupy.ndarray | None,
        codes_MK: cupy.ndarray,
        scale_M: cupy.ndarray,
        *,
        clip: np.float32,
        bits: int,
    ) -> None:
        """quantize of SwiGLU of gate and up, whose rows are interleaved as for linear.SWIGLU, from their integer sums.

        scale_M: of the sums' input, before it is of the codes. scale_R, bias_R: of gate's and up's rows.
        """
        assert self._whole is not None
        layout, signs = self._whole
        count, rows = sum_MR.shape
        check(sum_MR, "sums", np.int32, (count, rows))
        check(scale_R, "scale of rows", np.float32, (rows,))
        assert rows >= 2 * self.n
        check(codes_MK, "codes", np.int8, (count, None))
        check(scale_M, "scale", np.float32, (count,))
        shape = (("DENSE", layout.dense), ("COLUMNS", layout.columns), ("MT", layout.mt), ("NT", layout.nt))
        passes = (("PASSES", layout.passes), ("BIASED", int(bias_R is not None)))
        kernel("swiglu_hadamard", "swiglu_hadamard", (*shape, *passes)).launch(
            count,
            layout.threads,
            (
                sum_MR,
                scale_R,
                bias_R,
                signs,
                self._norm,
                codes_MK,
                scale_M,
                *map(np.int32, (rows, codes_MK.shape[1])),
                clip,
                np.int32(bits),
            ),
            shared=layout.shared,
            overlap=True,
        )

    def _signs(self, p_DD: np.ndarray, layout: Layout) -> cupy.ndarray:
        d_DD = np.kron(p_DD, sylvester_matrix(layout.dense // self._plan.m))
        return cupy.asarray(sign_words(d_DD, layout.row_parts * layout.tiles))

    def _cluster_fits(self) -> bool:
        """Whether the GPU can run the clusters of more than eight blocks, if any, for few tokens."""
        layout = self._layouts[True][0] if self._layouts else None
        if layout is None or layout.parts <= PORTABLE_CLUSTER:
            return True
        this = kernel("hadamard", "hadamard", (*layout.defines, ("CODES", 1)))
        return this.fits(layout.threads, layout.shared, layout.parts)

    def _check_input(self, x_MN: cupy.ndarray, factor_N: cupy.ndarray | None) -> None:
        check(x_MN, "x", np.float32, (None, self.n))
        if factor_N is not None:
            check(factor_N, "factor", np.float32, (self.n,))

    def _launch(
        self,
        x_MN: cupy.ndarray,
        factor_N: cupy.ndarray | None,
        y_MN: cupy.ndarray | None,
        quantized: tuple[Any, ...] = _NOT_QUANTIZED,
    ) -> None:
        """hadamard.cu, to y or to codes and scale. quantized: its arguments from codes on."""
        layout, signs = self._layouts[len(x_MN) <= FEW_TOKENS]
        assert x_MN.data.ptr % 16 == 0, "x: not aligned to 16 bytes"
        codes = int(y_MN is None)
        alone = layout.sum_after and not self._clusters
        kernel("hadamard", "hadamard", (*layout.defines, ("CODES", codes), *self._defines)).launch(
            len(x_MN) * self._plan.copies * (layout.row_parts if alone else layout.parts),
            layout.threads,
            (x_MN, factor_N, signs, self._norm, np.int32(self._plan.copies), y_MN, *quantized),
            shared=layout.shared_alone if alone else layout.shared,
            cluster=layout.parts if self._clusters and (codes or layout.sum_after) else 1,
            overlap=True,
        )
