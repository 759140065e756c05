"""Large GEMMs with a fused epilogue: ``out = activation(x @ weight.T + bias) + residual``, rounded once.

Two kernels. With TMA (compute capability 9.0 and above): persistent blocks walk the tiles; operands and residual come
and the result goes through tensor descriptors made on the host. With pointers: every other GPU, and operands that no
descriptor can address (a base off 16 bytes, rows that are not a multiple of 16 bytes apart, fp32 in tests).

A throw-away kernel of the first design ran at 1.03x to 1.09x cuBLAS on an H100 for 4096 x 4096 x {14336, 1024} and
8192^3, at 0.97x for 4096 x {7168, 28672} x 4096, and no setting was the best everywhere, hence the table. Slower there:
descriptors made on the device with automatic warp specialisation (0.91x to 0.99x of this design), a warp-specialised
Gluon kernel that was not persistent (0.91x to 0.99x), and tiles in plain order (GROUP_M=1: up to 45%).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tp_kernels.ops._gpu import GpuInfo, gpu_of
from tp_kernels.ops.kernels.epilogue import activate
from tp_kernels.ops.kernels.launch import AotCase, launch
from tp_kernels.ops.kernels.sizes import cdiv

__all__ = [
    "Config",
    "aot_cases",
    "candidates",
    "check_operands",
    "default_config",
    "fewest_waves",
    "matmul",
    "persistent_grid",
    "shared_bytes",
    "tile_of",
    "tma_addressable",
]

# Kernels -------------------------------------------------------------------------------------------------------------


@triton.jit
def tile_of(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile: bands of GROUP_M tile rows walked column by column, so that L2 keeps the operands."""
    band = tile // (GROUP_M * tiles_n)
    first = band * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = tile - band * (GROUP_M * tiles_n)
    return first + within % height, within // height


@triton.jit
def _finish(acc, out_desc, residual_desc, bias_ptr, off_m, off_n, N, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr):
    """Epilogue of WIDTH columns; descriptors cut off what lies outside."""
    if bias_ptr is not None:
        cols = off_n + tl.arange(0, WIDTH)
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION)
    if residual_desc is not None:
        acc += residual_desc.load([off_m, off_n]).to(tl.float32)
    out_desc.store([off_m, off_n], acc.to(out_desc.dtype))


@triton.jit
def _matmul_tma(
    out_desc,  # [M, N]
    x_desc,  # [M, K]
    weight_desc,  # [N, K]
    bias_ptr,  # [N] or None
    residual_desc,  # [M, N] or None
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
    FLATTEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    WIDTH: tl.constexpr = BLOCK_N // SUBTILES
    tiles_m, tiles_n, steps = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    programs = tl.num_programs(0)
    # The epilogue counts tiles by itself, so that nothing of the prologue has to live through the flattened loop.
    done = tl.program_id(0) - programs
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs, flatten=FLATTEN):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(steps):
            x = x_desc.load([tile_m * BLOCK_M, step * BLOCK_K])
            w = weight_desc.load([tile_n * BLOCK_N, step * BLOCK_K])
            acc = tl.dot(x, w.T, acc)
        done += programs
        tile_m, tile_n = tile_of(done, tiles_m, tiles_n, GROUP_M)
        off_m, off_n = tile_m * BLOCK_M, tile_n * BLOCK_N
        # Each thread holds columns of every part, so splitting moves no data; it makes the store's buffer smaller.
        if SUBTILES == 1:
            _finish(acc, out_desc, residual_desc, bias_ptr, off_m, off_n, N, WIDTH, ACTIVATION)
        else:
            left, right = tl.split(acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1))
            if SUBTILES == 2:
                _finish(left, out_desc, residual_desc, bias_ptr, off_m, off_n, N, WIDTH, ACTIVATION)
                _finish(right, out_desc, residual_desc, bias_ptr, off_m, off_n + WIDTH, N, WIDTH, ACTIVATION)
            else:
                a, b = tl.split(left.reshape(BLOCK_M, 2, WIDTH).permute(0, 2, 1))
                c, d = tl.split(right.reshape(BLOCK_M, 2, WIDTH).permute(0, 2, 1))
                _finish(a, out_desc, residual_desc, bias_ptr, off_m, off_n, N, WIDTH, ACTIVATION)
                _finish(b, out_desc, residual_desc, bias_ptr, off_m, off_n + WIDTH, N, WIDTH, ACTIVATION)
                _finish(c, out_desc, residual_desc, bias_ptr, off_m, off_n + 2 * WIDTH, N, WIDTH, ACTIVATION)
                _finish(d, out_desc, residual_desc, bias_ptr, off_m, off_n + 3 * WIDTH, N, WIDTH, ACTIVATION)


@triton.jit
def _matmul_pointers(
    out_ptr,  # [M, N]
    x_ptr,  # [M, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # [N] or None
    residual_ptr,  # [M, N] or None
    M,
    N,
    K,
    stride_out,  # between rows; columns are dense
    stride_x,
    stride_weight,
    stride_residual,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    # Rows past the end read the last one, and their results are not stored: no mask in the loop but that of K.
    x_at = x_ptr + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * stride_x + ks[None, :]
    w_at = weight_ptr + tl.minimum(cols, N - 1).to(tl.int64)[None, :] * stride_weight + ks[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x, w = tl.load(x_at), tl.load(w_at)
        else:
            inside = ks < K - start
            x = tl.load(x_at, mask=inside[None, :], other=0.0)
            w = tl.load(w_at, mask=inside[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_at += BLOCK_K
        w_at += BLOCK_K
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    rows = rows.to(tl.int64)[:, None]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + rows * stride_residual + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows * stride_out + cols[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


# Configurations ------------------------------------------------------------------------------------------------------


class Config(NamedTuple):
    """What may be tuned.

    Args:
        block_m, block_n, block_k: tile.
        num_warps, num_stages: as in Triton.
        group_m: tile rows in a band of the walk.
        subtiles: 1, 2 or 4 pieces in which a tile leaves (TMA); raised where the epilogue would not fit.
        flatten: one loop over tiles and K, so that the next tile's loads run during the epilogue (TMA).
        tma: which of the two kernels.
    """

    block_m: int
    block_n: int
    block_k: int = 64
    num_warps: int = 8
    num_stages: int = 3
    group_m: int = 8
    subtiles: int = 1
    flatten: bool = False
    tma: bool = True


# Bytes beside the tiles' buffers: barriers, and the bias on its way to the accumulator's layout (1 KiB compiled).
_SLACK = 2048


def shared_bytes(config: Config, itemsize: int = 2, residual: bool = False) -> int:
    """Bytes of shared memory that a block needs, never less than the compiler's figure."""
    operands = (config.block_m + config.block_n) * config.block_k * itemsize * config.num_stages
    tile = config.block_m * config.block_n * itemsize // config.subtiles
    if not config.tma:
        # Only one of the two at a time: the operands are gone before the result changes layout.
        return max(operands, config.block_m * config.block_n * itemsize) + _SLACK
    # In a flattened loop the residual's buffer lives beside the operands', otherwise in their place.
    return operands + tile * (2 if residual and config.flatten else 1) + _SLACK


def _with_epilogue(info: GpuInfo, config: Config, residual: bool, activation: bool) -> Config:
    """``config`` with pieces small enough for this epilogue."""
    registers = config.block_m * config.block_n // (32 * config.num_warps)
    if not config.tma:
        # 128 accumulators a thread: gelu and a residual spilled 416 bytes (sm_80).
        return config._replace(block_n=config.block_n // 2) if registers >= 128 and residual and activation else config
    # 128 accumulators a thread: a whole tile with bias and gelu spilled 96 bytes, halves with the residual, too, 56;
    # a whole tile with a residual alone took 218 registers instead of 162.
    subtiles = max(config.subtiles, 2 ** (residual + activation)) if registers >= 128 else config.subtiles
    while subtiles < 4 and shared_bytes(config._replace(subtiles=subtiles), residual=residual) > info.max_shared:
        subtiles *= 2
    return config._replace(subtiles=subtiles)


_TMA_LARGE = (
    Config(128, 256, num_stages=3),
    Config(128, 256, num_stages=3, flatten=True),
    Config(128, 256, num_stages=4, subtiles=2),
    Config(128, 256, num_stages=4, subtiles=2, flatten=True),
    Config(128, 256, num_stages=3, group_m=16),
    Config(128, 256, num_stages=3, group_m=4, flatten=True),
    Config(256, 128, num_stages=3, group_m=4),
    Config(128, 128, num_stages=4),
    Config(128, 128, num_stages=4, num_warps=4, flatten=True),
)
_TMA_MEDIUM = (
    Config(128, 256, num_stages=3, flatten=True),
    Config(128, 128, num_stages=4, group_m=4),
    Config(128, 128, num_stages=5, group_m=1),
    Config(128, 64, num_stages=6, num_warps=4, group_m=4),
)
_TMA_SMALL = (
    Config(64, 256, num_stages=4, num_warps=4, group_m=1),
    Config(64, 128, num_stages=4, num_warps=4, group_m=1),
    Config(64, 128, num_stages=6, num_warps=4, group_m=1),
    Config(64, 64, num_stages=6, num_warps=4, group_m=1),
)
_POINTERS = (
    Config(128, 256, 32, num_stages=4, tma=False),
    Config(128, 256, 64, num_stages=3, tma=False),
    Config(128, 128, 32, num_warps=4, num_stages=4, tma=False),
    Config(128, 128, 64, num_stages=3, tma=False),
    Config(64, 128, 64, num_warps=4, num_stages=3, tma=False),
    Config(64, 64, 64, num_warps=4, num_stages=3, tma=False),
)
# Operands that cannot be loaded 16 bytes at a time, one element a load: a larger tile spilled 3 KiB a thread (sm_80).
_SCALAR = _POINTERS[-1]
# Without tensor cores ("ieee"): small tiles, for tests.
_FP32 = Config(64, 64, 32, num_warps=4, num_stages=2, tma=False)


def _fits(info: GpuInfo, config: Config) -> bool:
    if not config.tma:
        # wgmma wants at least 64 of every dimension of a tile.
        return shared_bytes(config) <= info.max_shared and (config.block_k >= 64 or not info.hopper)
    return shared_bytes(_with_epilogue(info, config, True, True), residual=True) <= info.max_shared


def candidates(info: GpuInfo, dtype: torch.dtype, m: int, n: int, k: int) -> list[Config]:
    """Configurations worth measuring for x [m, k] and weight [n, k]; all fit the GPU's shared memory."""
    if dtype == torch.float32:
        return [_FP32]
    if info.has_tma:
        configs = (_TMA_MEDIUM if m > 64 else ()) + _TMA_SMALL if m <= 512 else _TMA_LARGE
    else:
        configs = tuple(c for c in _POINTERS if c.block_m == 64 or m > 64)
    return [config for config in configs if _fits(info, config)]


def fewest_waves(info: GpuInfo, configs: list[Config], m: int, n: int) -> Config:
    """The configuration whose waves of tiles over the multiprocessors cost least; the first of equals.

    A tile costs its products, or its operands' way from L2 where that takes longer. The balance is put at 128 x 256,
    the tiles with which throw-away kernels did some 700 TFLOP/s on an H100: 85 products for an element loaded.
    """

    def cost(config: Config) -> int:
        tiles = -(-m // config.block_m) * -(-n // config.block_n)
        tile = max(config.block_m * config.block_n, 85 * (config.block_m + config.block_n))
        return -(-tiles // info.num_sms) * tile

    return min(configs, key=cost)


def default_config(info: GpuInfo, dtype: torch.dtype, m: int, n: int, k: int, aligned: bool = True) -> Config:
    """A configuration that is right for every shape: tiles by the waves they make, the loop by the length of K.

    Args:
        info: the GPU.
        dtype: of the operands.
        m, n, k: x [m, k], weight [n, k].
        aligned: whether all operands can be loaded 16 bytes at a time.
    """
    if dtype == torch.float32:
        return _FP32
    configs: list[Config] = []
    if aligned and info.has_tma:
        configs = [Config(128, 128, num_stages=4), *_TMA_SMALL[:2]]
        if m <= 64:
            configs = configs[1:]
        elif k <= 2048:
            # Flattened, the throw-away kernel did 637 TFLOP/s at K=1024 (cuBLAS 616): the epilogue is much of a tile.
            configs.insert(0, _TMA_LARGE[1])
        else:
            configs.insert(0, _TMA_LARGE[2])
    elif not aligned or n % 16 or k % 16:
        return _SCALAR  # Triton knows of a stride only whether it is a multiple of 16
    configs = [config for config in configs if _fits(info, config)]
    return fewest_waves(info, configs or [config for config in _POINTERS if _fits(info, config)], m, n)


# Launcher ------------------------------------------------------------------------------------------------------------


def dense_rows(x: Tensor) -> bool:
    """Whether neighbours in a row of [M, N] are neighbours in memory."""
    return x.stride(1) == 1 or x.shape[1] <= 1


def tma_addressable(*tensors: Tensor | None) -> bool:
    """Whether tensor descriptors can address matrices with dense rows: everything in multiples of 16 bytes."""
    for x in tensors:
        if x is not None:
            stride, itemsize = x.stride(0), x.element_size()
            if itemsize != 2 or stride < x.shape[1] or stride * itemsize % 16 or x.data_ptr() % 16:
                return False
    return True


def check_operands(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, n: int, extra: dict[str, tuple[Tensor | None, int]]
) -> None:
    """Raise ValueError unless out [M, n], x [M, K], weight [N, K], bias [N] and extra [M, width] fit together."""
    m, (rows, k) = x.shape[0], weight.shape
    matrices = {"x": (x, m, k), "weight": (weight, rows, k), "out": (out, m, n)}
    matrices |= {name: (tensor, m, width) for name, (tensor, width) in extra.items() if tensor is not None}
    for name, (tensor, height, width) in matrices.items():
        if tensor.dim() != 2 or tensor.shape[0] != height or tensor.shape[1] != width:
            raise ValueError(f"expected {name} [{height}, {width}], got {list(tensor.shape)}")
        if not dense_rows(tensor):
            raise ValueError(f"expected {name} with dense rows, got strides {tensor.stride()}")
        if tensor.dtype is not x.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, x is {x.dtype}")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"expected float16, bfloat16 or float32, got {x.dtype}")
    if bias is not None and (bias.shape != (rows,) or bias.dtype is not x.dtype or (rows > 1 and bias.stride(0) != 1)):
        raise ValueError(f"expected a dense bias [{rows}] of {x.dtype}, got {list(bias.shape)} of {bias.dtype}")


def matmul(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    config: Config | None = None,
) -> None:
    """``out = activation(x @ weight.T + bias) + residual``: fp32 inside, rounded once.

    Args:
        out: [M, N], must not overlap the operands.
        x: [M, K].
        weight: [N, K].
        bias: [N].
        residual: [M, N].
        activation: None, "silu", "gelu", "gelu_tanh" or "relu".
        config: None takes the default. One for TMA is replaced by the default for pointers where no descriptor can
            address the operands. All matrices have dense rows at any distance; fp16, bf16 or fp32.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit.
    """
    (m, k), n = x.shape, weight.shape[0]
    check_operands(out, x, weight, bias, n, {"residual": (residual, n)})
    if m == 0 or n == 0:
        return
    info = gpu_of(x)
    # Nothing to sum over is for the pointers, too: a descriptor has no empty dimensions.
    aligned = k > 0 and tma_addressable(out, x, weight, residual)
    if config is None or (config.tma and not (aligned and info.has_tma)):
        config = default_config(info, x.dtype, m, n, k, aligned)
    config = _with_epilogue(info, config, residual is not None, activation is not None)
    if not config.tma:
        launch(
            _matmul_pointers,
            (cdiv(m, config.block_m) * cdiv(n, config.block_n),),
            out,
            x,
            weight,
            bias,
            residual,
            m,
            n,
            k,
            out.stride(0),
            x.stride(0),
            weight.stride(0),
            0 if residual is None else residual.stride(0),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            EVEN_K=k % config.block_k == 0,
            ACTIVATION=activation,
        )
        return
    tile = [config.block_m, config.block_n // config.subtiles]
    launch(
        _matmul_tma,
        (persistent_grid(info, config, m, n, residual is not None),),
        TensorDescriptor(out, [m, n], [out.stride(0), 1], tile),
        TensorDescriptor(x, [m, k], [x.stride(0), 1], [config.block_m, config.block_k]),
        TensorDescriptor(weight, [n, k], [weight.stride(0), 1], [config.block_n, config.block_k]),
        bias,
        None if residual is None else TensorDescriptor(residual, [m, n], [residual.stride(0), 1], tile),
        m,
        n,
        k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        SUBTILES=config.subtiles,
        FLATTEN=config.flatten,
        ACTIVATION=activation,
    )


def persistent_grid(info: GpuInfo, config: Config, m: int, n: int, residual: bool = False) -> int:
    """Blocks to launch: as many as run at once, two on a multiprocessor where both fit, or one a tile."""
    tiles = cdiv(m, config.block_m) * cdiv(n, config.block_n)
    # Each block takes 1 KiB beside what it asks for, and the multiprocessor has 1 KiB more than one block may take.
    room = (info.max_shared + 1024) // (shared_bytes(config, residual=residual) + 1024)
    return min(tiles, info.num_sms * (2 if room >= 2 and config.num_warps == 4 else 1))


# Compile checks ------------------------------------------------------------------------------------------------------


def _case(
    name: str,
    m: int,
    n: int,
    k: int,
    config: Config | None = None,
    residual: bool = False,
    bias: bool = False,
    activation: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    **expected: object,
) -> AotCase:
    def call() -> None:
        x, weight, out, add = (
            torch.empty(shape, device="meta", dtype=dtype) for shape in ((m, k), (n, k), (m, n), (m, n))
        )
        offset = torch.empty(n, device="meta", dtype=dtype) if bias else None
        matmul(out, x, weight, offset, add if residual else None, activation, config)

    return AotCase(f"matmul {name}", call, **expected)  # type: ignore[arg-type]


def aot_cases() -> list[AotCase]:
    """Every kind of loop and epilogue, with the tiles that leave the fewest registers and the least shared memory."""
    hopper = {"capabilities": (90,), "wgmma": True, "tma": True}
    flat, deep, deep_flat = _TMA_LARGE[1:4]
    everything: dict[str, object] = {"residual": True, "bias": True, "activation": "gelu"}
    return [
        _case("128x256 deep", 4096, 4096, 14336, deep, **hopper),
        _case("128x256 flat, residual", 4096, 4096, 1024, flat, residual=True, **hopper),
        _case("128x256 deep, everything", 4096, 4096, 4096, deep, **everything, **hopper),
        _case("128x256 deep flat, everything", 4096, 4096, 4096, deep_flat, **everything, **hopper),
        _case("64x128 small", 64, 4096, 4096, _TMA_SMALL[1], residual=True, **hopper),
        _case("default without TMA", 4096, 4096, 4096, residual=True, capabilities=(80,)),
        _case("pointers, ragged", 300, 4096 + 16, 4096 + 16, _POINTERS[3], **everything, wgmma=True, tma=False),
    ]
