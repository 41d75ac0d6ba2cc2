"""Known vulnerabilities of the pinned versions, by pip-audit: what was asked is told from what was answered.

    python .ci/audit.py PATH_OF_PIP_AUDIT REQUIREMENTS

pip-audit passes over what the service does not know, with success: a service that cannot be reached, or a mirror
without advisories, would look like a clean bill. Returns 0 where no vulnerability is known of those that were answered
for, and where none was; 1 where one is known.
"""

from __future__ import annotations

import json
import subprocess
import sys


def main(tool: str, requirements: str) -> int:
    """Run it and say in one sentence what came of it."""
    options = [
        "--requirement",
        requirements,
        "--no-deps",
        "--disable-pip",
        "--format",
        "json",
        "--progress-spinner",
        "off",
    ]
    run = subprocess.run([tool, *options], capture_output=True, text=True, check=False)
    try:
        found = json.loads(run.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = (run.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"The advisory service could not be reached, and nothing was audited: {last[:200]}")
        return 0
    return verdict(found)


def verdict(dependencies: list[dict[str, object]]) -> int:
    """From pip-audit's list of dependencies, each with its `vulns` or a `skip_reason`."""
    answered = [one for one in dependencies if "skip_reason" not in one]
    skipped = [str(one["name"]) for one in dependencies if "skip_reason" in one]
    bad = [one for one in answered if one.get("vulns")]
    if not answered:
        print(f"The advisory service knows none of {len(skipped)} packages, and nothing was audited: is it a mirror?")
        return 0
    for one in bad:
        for known in one["vulns"]:  # type: ignore[attr-defined]
            mended = ", ".join(known["fix_versions"]) or "no version"
            print(f"{one['name']} {one['version']}: {known['id']}, mended in {mended}")
    rest = f"; not known there: {', '.join(skipped)}" if skipped else ""
    print(f"{len(answered)} packages audited, {len(bad)} with a known vulnerability{rest}.")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
