"""The command of `dod` that looks at the installation: doctor. Imports come late."""

import argparse
import json


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Give the command line this sub-command."""
    doctor = commands.add_parser(
        "doctor",
        help="check environments, settings, disk, GPUs, S3 and its bucket, and say how to mend what is missing",
        description="Exit status: 0 nothing failed (there may be warnings), 1 something did.",
    )
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(action=do_doctor)


def do_doctor(given: argparse.Namespace) -> int:
    """Print what each check finds, and how to mend what is wrong."""
    from dod_pipeline import doctor, tables

    found = list(doctor.findings())
    if given.json:
        print(json.dumps([{"name": name, **finding._asdict()} for name, finding in found], indent=1))
    else:
        tables.findings(found)
    return int(any(finding.state == "fail" for _, finding in found))
