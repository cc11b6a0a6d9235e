"""Look every package of constraints.txt up among the known vulnerabilities of PyPI's advisories, by pip-audit.

Exit codes: 0 none is known, 4 some are, 7 not run: no network, or packages that the advisories do not know.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PINNED = Path(__file__).parents[1] / "constraints.txt"
OPTIONS = ("--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json")
FAILED, NOT_RUN = 4, 7


def judged(answer: str, said: str) -> tuple[int, list[str]]:
    """The exit code and what is printed. answer, said: pip-audit's standard output and error."""
    try:
        told: list[dict[str, Any]] = json.loads(answer)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return NOT_RUN, [f"audit: not run: {(said.strip().splitlines() or ['no answer'])[-1][:300]}"]
    known = [(one["name"], one["version"], found) for one in told for found in one.get("vulns", ())]
    skipped = [one["name"] for one in told if "skip_reason" in one]
    lines = [f"{name} {version}: {v['id']}, mended in {_listed(v['fix_versions'])}" for name, version, v in known]
    if skipped or not told:
        lines.append(f"audit: not run for {len(skipped)} of {len(told)} packages: {_listed(skipped)}")
    lines.append(f"audit: {len(known)} known vulnerabilities in {len(told) - len(skipped)} packages")
    return FAILED if known else NOT_RUN if skipped or not told else 0, lines


def _listed(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "") if names else "none"


def main() -> None:
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(PINNED), *OPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    code, lines = judged(done.stdout, done.stderr)
    print("\n".join(lines))
    sys.exit(code)


if __name__ == "__main__":
    main()
