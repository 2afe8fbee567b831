"""The site: every page is in the nav, every link goes somewhere, every example is well formed. Needs no mkdocs."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import tomllib
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from weightsync.config import parse_node_config

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
ELSEWHERE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!`)\[[^\]\[]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@cache
def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


@cache
def anchors(page: Path) -> set[str]:
    """As mkdocs makes them of headings: `toc` with its own slugify."""
    found = set()
    for title in HEADING.findall(prose(page)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        plain = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


def in_nav(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    children = entry.values() if isinstance(entry, dict) else entry
    return [page for child in children for page in in_nav(child)]


def nav() -> list[str]:
    text = (ROOT / "mkdocs.yml").read_text().replace("!!python/name:", "")  # mkdocs makes objects of these names
    return in_nav(yaml.safe_load(text)["nav"])


def blocks(*languages: str) -> list[tuple[str, str]]:
    return [
        (str(page.relative_to(ROOT)), text)
        for page in [*PAGES, *ELSEWHERE]
        for _, language, text in FENCE.findall(page.read_text())
        if language in languages
    ]


def deployment(language: str) -> list[str]:
    return [text for page, text in blocks(language) if page == "docs/deployment.md"]


def test_every_page_is_in_the_nav():
    made = set(re.findall(r'"([\w-]+\.md)": "', (DOCS / "site_hooks.py").read_text()))
    there = {str(page.relative_to(DOCS)) for page in PAGES} | made
    missing = sorted(there - set(nav()))
    assert not missing, f"add to `nav:` in mkdocs.yml, so that readers find it: {', '.join(missing)}"
    gone = sorted(set(nav()) - there)
    assert not gone, f"mkdocs.yml names what is not in docs/: {', '.join(gone)}"
    assert len(nav()) == len(set(nav())), "a page is twice in the nav"


@pytest.mark.parametrize("page", [*PAGES, *ELSEWHERE], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_go_somewhere(page):
    for link in LINK.findall(prose(page)):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{page.name} links to {link}: there is no such file (a folder is no page)"
        if page in PAGES:
            assert target.is_relative_to(DOCS), f"{page.name} links to {link}, which is not part of the site"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}: {target.name} has no such heading"


def test_links_are_found():
    assert LINK.findall("a [b](c.md#d), [`e`](f) and [g\nh](i)") == ["c.md#d", "f", "i"]


def test_examples_are_well_formed():
    for page, text in blocks("python"):
        try:
            ast.parse(text)
        except SyntaxError as error:
            pytest.fail(f"{page}: {error}\n{text}")
    for page, text in blocks("toml"):
        try:
            tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            pytest.fail(f"{page}: {error}\n{text}")
    for page, text in blocks("yaml"):
        assert list(yaml.safe_load_all(text)), page
    scripts = "\n".join(f"{{ :; {text}\n}}" for _, text in blocks("bash", "sh"))
    done = subprocess.run(["bash", "-n"], input=scripts, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr


def test_the_recipes_give_configs_that_weightsyncd_takes(tmp_path):
    from weightsync.wire.keys import make_key_file

    make_key_file(tmp_path / "cluster.key")
    (file,) = deployment("toml")
    file = file.replace("/etc/weightsync/cluster.key", str(tmp_path / "cluster.key"))
    (daemonset,) = (y for y in map(yaml.safe_load, deployment("yaml")) if y.get("kind") == "DaemonSet")
    pod = daemonset["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    values = {"NODE": "node-7", "ADDRESS": "10.0.0.7", "SEED": "10.0.0.1"}
    assert values.keys() <= {variable["name"] for variable in container["env"]}
    arguments = [re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], a) for a in container["args"]]
    config = parse_node_config(
        file, "node.toml", [a.removeprefix("--set=") for a in arguments if a.startswith("--set")]
    )
    assert (config.node.name, config.cluster.seed) == ("node-7", "tcp://10.0.0.1:29600")
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    assert config.node.listen.startswith(f"ipc://{mounts['run']}/")
    assert daemonset["spec"]["selector"]["matchLabels"] == daemonset["spec"]["template"]["metadata"]["labels"]
    assert pod["hostIPC"]
    assert pod["hostPID"]
    assert pod["terminationGracePeriodSeconds"] > config.timeouts.stop


def test_systemd_takes_the_unit(tmp_path):
    (unit,) = deployment("ini")
    assert "ExecStart=/opt/weightsync/bin/weightsyncd" in unit
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    file = tmp_path / "weightsyncd.service"
    file.write_text(unit.replace("/opt/weightsync/bin/weightsyncd", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", file], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def sentences() -> str:
    """All that the program may say: the constant parts of its strings."""
    said = []
    for root in ("weightsync", "daemon"):
        for file in (ROOT / root).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    said.append(node.value)
    return "\0".join(said)


def test_symptoms_are_what_the_program_says():
    said = sentences()
    shown = [text for page, text in blocks("text") if page == "docs/troubleshooting.md"]
    assert len(shown) > 20
    for text in shown:
        for part in text.strip().split("…"):
            assert part.strip() in said, f"docs/troubleshooting.md shows {text.strip()!r}; nothing says {part!r}"
