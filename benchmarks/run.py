"""Compares every op with plain PyTorch and with the best peers, on the cases of opinfo.

Each contender's result is checked against the float64 reference before it is timed; a wrong one
gets no speed, and the exit status is 1 where it is ours.

``--json FILE`` writes::

    {"conditions": {"device", "cpu", "gpu", "threads", "simd", "memory_gb_per_s", "versions": {name: version},
                    "commit", "date", "quick", "l2_flushed"},       # null: unknown, or not of this device
     "results": [
       {"op": "decode", "case": "SSD300 B=8",
        "contenders": [
          {"name": "ssd_ext",          # or "CUDA graph" (ours, replayed), "reference", "torch.compile", a peer
           "status": "timed",          # "once": slow, a single call; "wrong", "missing", "failed": no speed
           "note": "...",              # what is wrong or missing
           "median_ms": 0.1, "spread": 0.02, "samples": 900, "dropped": 30,
           "disturbed": false}, ...],  # true: other programs took CPU time in nearly every turn
        # where ours has a speed:
        "bytes": 2375104,              # the least traffic
        "gb_per_s": 23.7, "memory_share": 0.9,
        "ratios": {"reference": 12.3, ...},   # the other's time over ours
        "best_peer": "torchvision"}, ...],    # the fastest of all others
     "scaling": [                      # with --scaling: {"op", "rows"}, results is empty
       {"op": "decode", "rows": [{"batch": 1, "name": "ssd_ext", "status": "timed", "median_ms": ...}, ...]}],
     "base": {                         # with --base, and results is empty
       "revision": "HEAD~3", "commit": "1b2f...",       # null: a folder was named
       "old": {"compiler": "GCC 12.2.0", ...}, "new": {...},     # _C.build_info(), SIMD level and package of both
       "ops": [
         {"op": "decode",
          "comparisons": 54,           # each of a case in a dtype: all outputs and gradients
          "differences": [{"case", "dtype", "output": "gradient of deltas", "note": "2 of 96 elements, first at ..."}],
          "missing": [{"case", "dtype", "note"}],       # the old build has no such op or argument
          "timings": [{"case": "SSD300 B=8", "old": {"median_ms", "spread", "samples", "dropped", "disturbed"},
                       "new": {...},
                       "ratio": 1.2,   # old over new, the median of
                       "ratios": [1.1, 1.3, 1.2]}]}]}}          # three pairs of processes

``--base REV`` compares with another revision instead, which is built first (``revision.py``): every case of the ops
to the bit, in every dtype and with the gradients, then both builds take turns on the cases of the benchmark
(``base.py``). ``--quick`` leaves out the large cases that are not timed. The exit status is 1 where any bit differs.
``--device emulated``, in a build with the emulator of CUDA, compares the bits of the CUDA kernels.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import sys
import warnings
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a script
    del sys.path[0]
    if any((ROOT / "ssd_ext").glob("_C*.so")):
        sys.path.insert(0, str(ROOT))
    else:  # not built in this tree: the installed ssd_ext is meant
        sys.path.append(str(ROOT))

import torch  # noqa: E402

import ssd_ext  # noqa: E402
from benchmarks import report  # noqa: E402
from benchmarks.base import DiedError, Found, RaisedError, compare_builds, pairs_of  # noqa: E402
from benchmarks.measure import GRAPH, OURS, Plan, contenders_of, measure, measure_scaling  # noqa: E402
from benchmarks.record import commit, cpu_model, write_json  # noqa: E402
from benchmarks.revision import Base, RevisionError, built  # noqa: E402
from benchmarks.timing import CpuClock, CudaClock, memory_rate  # noqa: E402
from opinfo import OPS  # noqa: E402
from opinfo.spec import Case, OpInfo  # noqa: E402
from ssd_ext import _C  # noqa: E402

QUICK = Plan(seconds=0.5, rounds=3, slow=0.5, compile_limit=60)
BATCHES = [1, 2, 4, 8, 16, 32, 64, 128]
WRONG = {OURS: ("wrong", "failed", "missing"), GRAPH: ("wrong", "failed")}  # a fault of ours


def make_parser() -> argparse.ArgumentParser:
    by_name = {op.name: op for op in OPS}
    scalable = [name for name, op in by_name.items() if op.scaling]
    parser = argparse.ArgumentParser(
        prog="python benchmarks/run.py",
        description="Compare ssd_ext's ops with plain PyTorch, torch.compile and the best peers: every result is "
        "checked against the float64 reference, then all take turns in one process.",
        epilog=f"ops: {', '.join(by_name)}",
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda", "emulated"], default="cpu", help="where to run (default: cpu)"
    )
    parser.add_argument(
        "--ops", nargs="+", choices=by_name, metavar="NAME", default=list(by_name), help="only these ops (default: all)"
    )
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="only the cases of these names (default: all)")
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        default=torch.get_num_threads(),
        help="CPU threads, of ours and of the others (default: torch's choice, here %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="one or two cases an op and few rounds: about a minute")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="nothing by torch.compile")
    parser.add_argument(
        "--flush-l2",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on CUDA, evict what is in the L2 cache before each call (default: yes)",
    )
    parser.add_argument(
        "--scaling",
        choices=scalable,
        metavar="OP",
        help=f"instead, time ours over B = 1, 2, 4 ... {BATCHES[-1]} (one of: {', '.join(scalable)})",
    )
    parser.add_argument(
        "--base",
        metavar="REV",
        help="instead, compare with this revision, or with the folder of another built tree: bits on all cases, then "
        "times (with --device emulated, in a build with the emulator: bits of the CUDA kernels only)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and the conditions")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a .png or .svg (needs matplotlib)")
    return parser


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What argparse cannot tell; before minutes of measuring."""
    known = {case.name for op in OPS if op.name in args.ops for case in op.cases if case.benchmark}
    for name in args.cases or []:
        if name not in known:
            parser.error(f"argument --cases: no such case: {name!r} (choose from {', '.join(sorted(known))})")
    if args.cases and (args.base or args.scaling):
        parser.error("argument --cases: not with --base or --scaling, which have their own")
    if args.threads < 1:
        parser.error(f"argument --threads: must be at least 1, got {args.threads}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch finds no CUDA device here")
    if args.device == "cuda" and "cuda" not in _C.build_info():
        parser.error("argument --device: ssd_ext was built without CUDA; rebuild with SSD_EXT_CUDA=ON")
    if args.device == "emulated" and not (args.base and "emulator" in _C.build_info()):
        parser.error("argument --device: emulated needs --base and a build with SSD_EXT_EMULATE (see CONTRIBUTING.md)")
    if args.base and (args.plot or args.scaling):
        parser.error("argument --base: not with --plot or --scaling, which show one build alone")
    if args.plot and args.scaling:
        parser.error("argument --plot: not with --scaling, which has nobody to compare with")
    for option, file in (("--json", args.json), ("--plot", args.plot)):
        if file and not file.absolute().parent.is_dir():
            parser.error(f"argument {option}: no such directory: {file.absolute().parent}")
    if args.plot and args.plot.suffix not in (".png", ".svg"):
        parser.error(f"argument --plot: must end in .png or .svg, got {args.plot}")
    if args.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            parser.error("argument --plot: needs matplotlib (pip install '.[bench]')")


def conditions(args: argparse.Namespace, rate: float | None) -> dict[str, Any]:
    cuda = args.device == "cuda"
    return {
        "device": args.device,
        "cpu": cpu_model(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "threads": args.threads,
        "simd": _C.simd_level(),
        "memory_gb_per_s": rate and rate * 1e-9,
        "versions": {"torch": torch.__version__} | {name: _version(name) for name in ("torchvision", "onnxruntime")},
        "commit": commit(),
        "date": datetime.now().astimezone().isoformat(sep=" ", timespec="minutes"),
        "quick": args.quick,
        "l2_flushed": args.flush_l2 if cuda else None,
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


class Progress:
    """A bar on a terminal's stderr, where tqdm is installed; nothing elsewhere."""

    def __init__(self, total: int):
        try:
            from tqdm import tqdm
        except ImportError:
            self._bar = None
        else:
            self._bar = tqdm(total=total, disable=None, leave=False, unit="case", file=sys.stderr)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.close()

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.set_description(text)

    def step(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def print(self, text: str) -> None:
        """To stdout, and the bar not in its way."""
        if self._bar is not None:
            self._bar.clear()
        print(text, flush=True)


def chosen_cases(op: OpInfo, args: argparse.Namespace) -> list[Case]:
    timed = [case for case in op.cases if case.benchmark]
    if args.cases:
        return [case for case in timed if case.name in args.cases]
    return [case for case in timed if case.quick or not args.quick]


def compare(ops, args, clock, plan, rate, save) -> list[dict[str, Any]]:
    """Measure case by case, ``save(results)`` after each, and print op by op."""
    chosen = [(op, chosen_cases(op, args)) for op in ops]
    results = []
    with Progress(sum(len(cases) for _, cases in chosen)) as progress:
        for op, cases in chosen:
            done = []
            for case in cases:
                save(results + done)
                contenders = contenders_of(op, case, plan, args.compile, captured=args.device == "cuda")
                say = lambda text, at=f"{op.name}, {case.name}": progress.say(f"{at}: {text}")  # noqa: E731
                done.append(measure(op, case, contenders, clock, plan, rate, say))
                progress.step()
            if done:
                progress.print(f"\n{report.op_table(op.name, done)}")
            results += done
            save(results)
    return results


def scale(op, clock, plan) -> list[dict[str, Any]]:
    with Progress(len(BATCHES)) as progress:
        rows = measure_scaling(op, clock, plan, BATCHES, progress.say)
    print(f"\n{report.scaling_table(op.name, rows)}")
    return rows


def against_base(args, base: Base, plan, made, save) -> list[Found]:
    """Compare this build with the other; the findings, op by op."""
    here = Path(ssd_ext.__file__).resolve().parent.parent
    builds = (args.base, base.folder), ("this build", here)
    with pairs_of(*builds, args.device, args.threads, args.flush_l2) as pairs:
        old, new = (side.info for side in pairs[0])
        made["base"] = {"revision": args.base, "commit": base.commit, "old": old, "new": new, "ops": []}

        def keep(findings: list[Found]) -> None:
            made["base"]["ops"] = [asdict(found) for found in findings]
            save([])

        ops = [op for op in OPS if op.name in args.ops]
        findings = compare_builds(ops, pairs, args.device, args.quick, plan, Progress, keep)
    for fact in ("compiler", "torch_headers", "simd"):
        if old[fact] != new[fact]:
            print(f"\nnot built alike: {fact} is {old[fact]} in {args.base}, {new[fact]} here")
    print(f"\n{report.bits_text(findings)}")
    return findings


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(arguments)
    check_arguments(parser, args)
    try:
        base = built(args.base, _C.build_info(), args.device) if args.base else None
    except RevisionError as e:
        parser.error(f"argument --base: {e}")
    # What torch.compile has to say about a reference is not this program's to report.
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="torch")
    torch.set_num_threads(args.threads)
    clock = CudaClock(args.flush_l2) if args.device == "cuda" else CpuClock()
    plan = QUICK if args.quick else Plan()

    rate = None if base else memory_rate(clock)
    under = conditions(args, rate)
    made = {"conditions": under, "results": []}

    def save(results: list[dict[str, Any]]) -> None:
        made["results"] = results
        if args.json:
            write_json(args.json, made)

    print(report.conditions_text(under), flush=True)
    if base:
        try:
            findings = against_base(args, base, plan, made, save)
        except (DiedError, RaisedError) as e:
            sys.exit(f"run.py: {e}")
        return int(any(found.differences for found in findings))
    if args.scaling:
        op = next(op for op in OPS if op.name == args.scaling)
        rows = scale(op, clock, plan)
        made["scaling"] = [{"op": op.name, "rows": rows}]
        save([])
        failed = [row for row in rows if row["status"] in WRONG[OURS]]
    else:
        results = compare([op for op in OPS if op.name in args.ops], args, clock, plan, rate, save)
        print(f"\n{report.LEGEND}\n\n{report.summary(results)}\n\n{report.conditions_text(under)}")
        rows = [row for result in results for row in result["contenders"]]
        failed = [row for row in rows if row["status"] in WRONG.get(row["name"], ())]

    if args.plot:
        from benchmarks.plot import draw

        draw(made["results"], [under], args.plot)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
