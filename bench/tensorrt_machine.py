"""On a GPU machine without a network: sets up what tensorrt_pack.py carried there, and proves engines on that GPU.

    python bench/tensorrt_machine.py setup PIECES ROOT
    python bench/tensorrt_machine.py prove MODEL … [--types F16,W8A16,W8A8] [--text FILE] [--positions 512] [--jobs 4]
        [--python ROOT/bin/python] [--keep FOLDER] [--out FOLDER] [-- more options of llmx export]
    python bench/tensorrt_machine.py parity ENGINE MODEL [--text FILE] [--positions 512]

`setup` unpacks, installs the wheels for the Python that runs it and lets that Python find this checkout as llmx.
`prove` gives each MODEL and type to `llmx export --format tensorrt`, which builds the engine and validates it, several
at once; then `parity` compares the engine's logits with those of transformers in float32, the whole sequence by prefill
and its second half by decoding. A line each; all output is kept in the log. Exit code 1 where anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import site
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tensorrt_pack

HERE = Path(__file__).resolve()
CHECKOUT = HERE.parent.parent
METADATA = "Metadata-Version: 2.1\nName: llmx\nVersion: {version}\n"
TAIL = 12  # lines of a failed command that a result shows

Result = dict[str, Any]


def setup(asked: argparse.Namespace) -> int:
    """Unpacks every archive, installs the wheels and makes this checkout the package llmx of this Python."""
    tensorrt_pack.unpack(asked)
    wheels = sorted(map(str, asked.root.glob("wheels/*.whl")))
    if wheels:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--root-user-action=ignore"]
        subprocess.run([*pip, *wheels], check=True)
    place = Path(site.getsitepackages()[0])
    (place / "llmx-checkout.pth").write_text(f"{CHECKOUT}\n")
    about = place / "llmx-0.1.0.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text(METADATA.format(version="0.1.0"))
    python = asked.root.resolve() / "bin" / "python"
    if python.exists():
        told = subprocess.run(
            [python, "-c", "import tensorrt; print('TensorRT', tensorrt.__version__)"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        print(told.stdout.strip() or told.stderr.strip())
        return told.returncode
    return 0


def run(command: Sequence[str], environment: dict[str, str]) -> tuple[int, str, float]:
    """(exit code, what was printed, seconds)."""
    started = time.perf_counter()
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=environment
    )
    return done.returncode, done.stdout, time.perf_counter() - started


def proved(model: Path, type_name: str, asked: argparse.Namespace) -> tuple[Result, str]:
    """(what one export came to, all that its commands printed)."""
    environment = dict(os.environ)
    if asked.python:
        environment["LLMX_TENSORRT_PYTHON"] = str(asked.python)
    folder = asked.keep / f"{model.name}-{type_name}"
    text = ["--text", str(asked.text)] if asked.text else []
    export = [sys.executable, "-m", "llmx.cli", "export", str(model), "--format", "tensorrt", "--type", type_name]
    export += ["-o", str(folder), "--max-input", str(asked.max_input), "--max-length", str(asked.max_length)]
    export += ["--positions", str(asked.positions), *text, "--threads", str(asked.threads), "--force", *asked.more]
    code, printed, spent = run(export, environment)
    result: Result = {"model": model.name, "type": type_name, "exit_code": code, "export_seconds": round(spent, 1)}
    log = [f"$ {' '.join(export)}\n{printed}"]
    report = folder / "report.json"
    if report.exists():
        result["report"] = json.loads(report.read_text())
        result["engine_bytes"] = sum(path.stat().st_size for path in folder.glob("*.engine"))
    else:
        result["problem"] = printed.splitlines()[-TAIL:]
    if (folder / "config.json").exists():
        compare = [sys.executable, str(HERE), "parity", str(folder), str(model), *text]
        code, printed, _ = run([*compare, "--positions", str(asked.positions)], environment)
        log.append(f"$ {' '.join(compare)}\n{printed}")
        lines = [line for line in printed.splitlines() if line.startswith("{")]
        result["parity"] = json.loads(lines[-1]) if code == 0 and lines else {"problem": printed.splitlines()[-TAIL:]}
    return result, "\n".join(log)


def line(result: Result) -> str:
    """One result in one line, or with the last words of what failed."""
    start = f"{result['model']:18} {result['type']:6} exit {result['exit_code']} {result['export_seconds']:6.1f} s"
    told = [f"{result.get('engine_bytes', 0) / 1e6:7.1f} MB"]
    parity = result.get("parity", {})
    for way in ("prefill", "decode"):
        if way in parity:
            found = parity[way]
            told.append(f"{way} KL {found['kl']:.1e} (max {found['kl_max']:.1e}) top-1 {found['top1']:.4f}")
    problems = [*result.get("problem", []), *parity.get("problem", [])]
    return f"{start} {', '.join(told)}" + "".join(f"\n    {problem}" for problem in problems)


def prove(asked: argparse.Namespace) -> int:
    asked.keep.mkdir(parents=True, exist_ok=True)
    asked.out.mkdir(parents=True, exist_ok=True)
    jobs = [(model, type_name) for model in asked.models for type_name in asked.types.split(",")]
    results, failed = [], 0
    with ThreadPoolExecutor(asked.jobs) as pool, (asked.out / "prove.log").open("a", encoding="utf-8") as log:
        for result, printed in pool.map(lambda job: proved(job[0], job[1], asked), jobs):
            print(line(result), flush=True)
            log.write(printed + "\n")
            log.flush()
            results.append(result)
            failed += bool(result["exit_code"] or "problem" in result or "problem" in result.get("parity", {}))
            (asked.out / "prove.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"{len(jobs) - failed} of {len(jobs)} passed")
    return int(failed > 0)


def compared(theirs: Any, ours: Any) -> dict[str, float]:
    """KL(theirs ‖ ours) in nats, mean and largest, and how often both find the same token likeliest. f32[T, V]."""
    from llmx.validate.metrics import kl_divergence, log_softmax

    kl = kl_divergence(log_softmax(theirs), log_softmax(ours))
    same = (theirs.argmax(-1) == ours.argmax(-1)).mean()
    return {
        "kl": float(kl.mean()),
        "kl_max": float(kl.max()),
        "top1": float(same),
        "largest_difference": float(abs(theirs - ours).max()),
    }


def parity(asked: argparse.Namespace) -> int:
    import numpy as np
    import torch

    from llmx.models.model import open_model
    from llmx.validate.oracle import Reference, Tokens
    from llmx.validate.runtimes import find_runtime
    from llmx.validate.sample_text import SAMPLE_TEXT

    torch.backends.cuda.matmul.allow_tf32 = False
    context = json.loads((asked.engine / "config.json").read_text())["max_length"]
    length = min(asked.positions, context, open_model(asked.model).architecture.context_length)
    text = SAMPLE_TEXT if asked.text is None else asked.text.read_text(encoding="utf-8")[: 40 * length]
    tokens = Tokens(asked.model).encode(text, add_special=False)[:length]
    theirs = np.concatenate(list(Reference(asked.model, threads=asked.threads).logits(tokens)))
    told: dict[str, Any] = {"positions": len(tokens)}
    with find_runtime("tensorrt").open(asked.engine, threads=1, context=length) as session:
        told["build"] = session.build
        for way, decode_from in (("prefill", None), ("decode", length // 2)):
            told[way] = compared(theirs, np.concatenate(list(session.logits(tokens, decode_from))))
    print(json.dumps(told))
    return 0


def arguments(words: Sequence[str]) -> argparse.Namespace:
    own, more = (list(words), [])
    if "--" in own:
        own, more = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    setting = commands.add_parser("setup", help="unpack and install")
    setting.add_argument("folder", type=Path, metavar="PIECES")
    setting.add_argument("root", type=Path)
    proving = commands.add_parser("prove", help="export, build, run and compare")
    proving.add_argument("models", type=Path, nargs="+")
    proving.add_argument("--types", default="F16,W8A16,W8A8")
    proving.add_argument("--jobs", type=int, default=4, help="exports at once")
    proving.add_argument("--python", type=Path, help="what LLMX_TENSORRT_PYTHON is set to")
    proving.add_argument("--max-input", type=int, default=128)
    proving.add_argument("--max-length", type=int, default=512)
    proving.add_argument("--keep", type=Path, default=Path("/tmp/llmx-engines"), help="folder of the engines")
    proving.add_argument("--out", type=Path, default=Path(), help="folder of prove.json and prove.log")
    comparing = commands.add_parser("parity", help="one engine against transformers")
    comparing.add_argument("engine", type=Path)
    comparing.add_argument("model", type=Path)
    for either in (proving, comparing):
        either.add_argument("--text", type=Path, help="text to compare on")
        either.add_argument("--positions", type=int, default=512)
        either.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args(own)
    asked.more = more
    return asked


COMMANDS = {"setup": setup, "prove": prove, "parity": parity}

if __name__ == "__main__":
    given = arguments(sys.argv[1:])
    sys.exit(COMMANDS[given.command](given))
