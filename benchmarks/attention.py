"""Time the attention backends, forward and backward: backend x length x type, packed and not.

    python benchmarks/attention.py
    python benchmarks/attention.py --device cuda --lengths 49,197,785

The number of tokens per call is the same for every length, so rows differ in the work of attention alone. "auto" marks
the backend that `attend` would choose.
"""

import argparse
import statistics
from collections.abc import Callable

import common
import torch
from torch import Tensor

from xscale_lightning.models.attention import attend, available_backends, choose_backend


def packed_lengths(length: int, tokens: int) -> tuple[int, ...]:
    """Sequences of two lengths, `length` and half of it, that fill about `tokens`; shortest first, as methods pack."""
    half = max(1, length // 2)
    count = max(1, round(tokens / (length + half)))
    return (half,) * count + (length,) * count


def make_call(
    backend: str, dtype: torch.dtype, device: torch.device, args: argparse.Namespace, length: int, packed: bool
) -> Callable[[], None]:
    """A function that runs forward and backward once."""
    seqlens = packed_lengths(length, args.tokens) if packed else None
    shape = (1, sum(seqlens)) if seqlens else (max(1, args.tokens // length), length)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(*shape, args.heads, args.head_dim, generator=generator).to(device, dtype).requires_grad_()
        for _ in range(3)
    ]

    def call() -> None:
        out: Tensor = attend(*inputs, seqlens=seqlens, backend=backend)  # type: ignore[arg-type]
        torch.autograd.grad(out.sum(), inputs)

    return call


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", default="17,50,65,128,197,256,512,1024", help="tokens per sequence, with commas")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per call")
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=1.5, help="time to spend per row")
    parser.add_argument("--output", help="folder for attention.json; benchmarks/results unless given")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    backends = available_backends(device)
    rows, results = [], []
    for packed in (False, True):
        for dtype_name in args.dtypes.split(","):
            dtype = common.DTYPES[dtype_name]
            for length in (int(text) for text in args.lengths.split(",")):
                calls = {b: make_call(b, dtype, device, args, length, packed) for b in backends}
                times = common.interleave(calls, device, args.seconds, warmup=1, least=3)
                median = {name: statistics.median(values) * 1e3 for name, values in times.items()}
                chosen, fastest = choose_backend(device, dtype)[0], min(median, key=lambda name: median[name])
                row = {"packed": packed, "dtype": dtype_name, "length": length, "milliseconds": median}
                results.append({**row, "auto": chosen, "fastest": fastest, "rounds": len(times[backends[0]])})
                cells = [f"{median[b]:.2f}{' auto' if b == chosen else '     '}" for b in backends]
                rows.append([f"{'packed' if packed else 'plain '} {dtype_name}", str(length), *cells, fastest])
    print(common.table(["forward + backward", "tokens", *(f"{b} ms     " for b in backends), "fastest"], rows))
    settings = {name: getattr(args, name) for name in ("tokens", "heads", "head_dim")}
    print("written:", common.write_result("attention", device, {**settings, "rows": results}, args.output))


if __name__ == "__main__":
    main()
