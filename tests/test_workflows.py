"""Workflows of GitHub run targets of the Makefile, name actions by commits, and may write only where they publish."""

import re

import pytest

from tests.conftest import ROOT

yaml = pytest.importorskip("yaml")
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in ROOT.glob(".github/workflows/*.yml")
}


@pytest.fixture(params=WORKFLOWS)
def workflow(request):
    return WORKFLOWS[request.param]


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_actions_are_named_by_the_hash_of_a_commit(workflow):
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert used and not [action for action in used if not re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", action)]


def test_an_action_has_the_same_commit_everywhere():
    used = {step["uses"] for workflow in WORKFLOWS.values() for step in steps(workflow) if "uses" in step}
    assert len({action.partition("@")[0] for action in used}) == len(used)


def test_commands_are_targets_of_the_makefile(workflow):
    """But for the one that opens an issue."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = [step["run"] for step in steps(workflow) if "run" in step]
    commands = [command for command in commands if not command.startswith("gh issue create ")]
    targets = [re.fullmatch(r"make ([\w-]+).*", command)[1] for command in commands]
    assert targets and not [target for target in targets if not re.search(rf"^{target}:", makefile, re.M)]


def test_a_job_that_runs_code_of_the_repository_gets_no_right_to_publish(workflow):
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        runs = any(step.get("run", "").startswith("make") for step in job["steps"])
        writes = {right for right, value in job.get("permissions", {}).items() if value == "write"}
        allowed = {"id-token", "attestations"} if runs else {"id-token", "attestations", "issues"}
        assert name == "publish" or writes <= allowed
        assert not (runs and "environment" in job)
