"""The documentation against the code: commands, flags, files and links; and which file may import which."""
import ast
import functools
import re
import shlex

import finetune                                              # noqa: F401, slow imports before the forks
import harness
import pytest
import sklearn.manifold                                      # noqa: F401, as above
from harness import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
GROUND = {"data", "models", "training"}
METHODS = {"randommask", "findna", "cm_gems"}
TOOLS = {"download", "report", "predict", "embed", "variants", "mutagenesis", "export", "table", "figures",
         "bench"}
FIGURES = {"loss", "embeddings", "attention", "masks", "results", "comparisons"}       # of tools.figures
BY_HAND = {"tests/mutants.py", "tests/faults/soak.py"}
OTHER = {"--help", "--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint"}        # torchrun's
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
COMMAND = re.compile(r"(?:python|torchrun) (?:\S+ )*?(?:-m (?=tools\.))?(tools\.\w+|(?!-)\S+\.py)(?= |$)(.*)")


def read(page):
    """(text without the fenced blocks, text of the fenced blocks) of a page."""
    text = page.read_text()
    return FENCE.sub("", text), "\n".join(FENCE.findall(text))


def commands_of(page):
    """(program, arguments) of each command, fenced or between backticks; the program is X.py or tools.X."""
    text, fenced = read(page)
    lines = fenced.replace("\\\n", " ").split("\n") + re.findall(r"`([^`\n]+)`", text)
    for line in lines:
        for part in re.split(r"&&|[;&]", re.sub(r"\s#.*", "", line)):
            match = COMMAND.match(part.strip())
            if match:
                yield match[1], shlex.split(match[2])


COMMANDS = [(page.name, *command) for page in PAGES for command in commands_of(page)]
PROGRAMS = sorted({program for _, program, _ in COMMANDS})


def flags_in(text):
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


@functools.cache
def help_of(program, *figure):
    """The usage that --help prints; of a script that is run by hand, its source."""
    if program in BY_HAND:
        return (ROOT / program).read_text()
    result = harness.run([*figure, "--help"], script=program)
    assert result.code == 0, f"{program} --help: exit code {result.code}\n{result.err[-500:]}"
    return result.out.split("\n\n")[0]


def test_every_script_and_tool_has_a_command():
    scripts = {f"{name}.py" for name in METHODS | {"finetune"}}
    assert set(PROGRAMS) == scripts | {f"tools.{name}" for name in TOOLS} | BY_HAND
    assert {arguments[0] for _, program, arguments in COMMANDS if program == "tools.figures"} == FIGURES
    assert len(COMMANDS) > 90


@pytest.mark.parametrize("program", PROGRAMS)
def test_commands_use_flags_and_choices_that_exist(program):
    for page, _, arguments in [command for command in COMMANDS if command[1] == program]:
        text = help_of(program, *arguments[:1] if program == "tools.figures" else [])
        unknown = {argument for argument in arguments if argument[:2] == "--"} - flags_in(text)
        assert not unknown, f"{page}: {program} has no {', '.join(unknown)}"
        for flag, value in zip(arguments, arguments[1:]):
            choices = re.search(rf"{flag} {{(.*?)}}", text) if flag[:2] == "--" else None
            assert not choices or value in choices[1].split(","), f"{page}: {program} {flag} {value}"


def test_flags_named_in_the_text_exist():
    helps = [help_of(program) for program in PROGRAMS] + [help_of("tools.figures", name) for name in FIGURES]
    known = OTHER | flags_in(" ".join(helps))
    for page in PAGES:
        unknown = flags_in(" ".join(re.findall(r"`([^`]+)`", read(page)[0]))) - known
        assert not unknown, f"{page.name}: no script has {', '.join(unknown)}"


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", read(page)[0], re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_images_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)[0]):
        path, _, anchor = target.partition("#")
        other = page.parent / path if path else page
        if not target.startswith("https://"):
            assert other.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(other), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_the_repository_exist(page):
    text = page.read_text()
    paths = re.findall(r"(?<![\w./])(?:tools|tests|docs|results|\.ci)/[\w./-]*\w", text)
    paths += re.findall(r"(?<![\w./])(\w+\.py|requirements\.txt)\b", text)
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing, f"{page.name}: {missing}"


def test_the_hacking_table_names_what_is_there():
    table = (ROOT / "README.md").read_text().split("## Hacking")[1].split("\n## ")[0]
    places = re.findall(r"((?:`\w+`(?:, )?)+) in (\w+\.py)", table)
    assert len(places) >= 8
    for names, file in places:
        for name in re.findall(r"\w+", names):
            pattern = rf"^(?:def|class) {name}\b|^{name} = "
            assert re.search(pattern, (ROOT / file).read_text(), re.M), f"{name} in {file}"


def test_the_readme_is_short():
    readme = (ROOT / "README.md").read_text().splitlines()
    assert len(readme) <= 190
    assert not [line for line in readme if len(line) > 120 and line[0] != "|"]


def local_imports(path):
    """Modules of this repository that a file imports: (anywhere but in a function, in a function)."""
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    nested, found = {id(node) for function in functions for node in ast.walk(function)}, (set(), set())
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"tools.{alias.name}" if node.module == "tools" else node.module for alias in node.names]
        found[id(node) in nested].update(name for name in names if name.split(".")[0] in harness.LOCAL)
    return found


def test_the_top_level_and_the_tools_are_as_designed():
    assert {path.stem for path in ROOT.glob("*.py")} == GROUND | METHODS | {"finetune"}
    helpers = {"__init__", "bench_gpu", "evidence"}
    assert {path.stem for path in (ROOT / "tools").glob("*.py")} == TOOLS | helpers


@pytest.mark.parametrize("name", sorted(GROUND))
def test_the_ground_floor_imports_nothing_local(name):
    assert local_imports(ROOT / f"{name}.py") == (set(), set())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_imports_the_ground_floor_only(name):
    assert set.union(*local_imports(ROOT / f"{name}.py")) <= GROUND


def test_finetune_imports_the_ground_floor_and_its_table_when_it_prints_it():
    top, nested = local_imports(ROOT / "finetune.py")
    assert top <= GROUND and nested <= {"tools.table"}
