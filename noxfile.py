"""One command for each habit: `nox -l` lists them, `nox -s fast` runs the fast tests in the environment you are in."""

import nox

nox.options.default_venv_backend = "none"  # the tools of the environment that `pip install -e '.[dev]'` made
nox.options.sessions = ["style", "types", "fast"]


@nox.session
def style(session):
    """Format and lint, mending what can be mended."""
    session.run("ruff", "format", ".")
    session.run("ruff", "check", "--fix", ".")


@nox.session
def types(session):
    """Check types: strict, in src."""
    session.run("mypy")


@nox.session
def fast(session):
    """Run the fast tests, under five minutes on two cores; arguments after -- go to pytest."""
    session.run("pytest", *session.posargs)


@nox.session
def slow(session):
    """Run the tests that start processes, kill them, or take long."""
    session.run("pytest", "-m", "slow", "--dist", "loadfile", "--no-loadscope-reorder", *session.posargs)


@nox.session
def vllm(session):
    """Run the tests against a real vLLM, its CPU build in an environment of its own."""
    session.run("bash", ".ci/vllm", *session.posargs, external=True)


@nox.session
def docs(session):
    """Draw again what is drawn from code or results: the rooms' imports and the quickstart's curves."""
    session.run("python", "docs/draw_imports.py")
    session.run("python", "benchmarks/plot_quickstart.py")


@nox.session
def notebook(session):
    """Run docs/notebooks/sandbox.ipynb again and keep its outputs, about a minute."""
    session.run("python", "docs/run_notebook.py")


@nox.session
def pages(session):
    """Check every block and command of the pages; with `-- -m slow` run those that train, too."""
    session.run("pytest", "tests/test_docs_code.py", "tests/test_notebook.py", *session.posargs)


@nox.session
def site(session):
    """Build the documentation into site/, strictly; needs `pip install -e '.[docs]'`."""
    session.run("mkdocs", "build", "--strict")


@nox.session
def wheel(session):
    """Build sdist and wheel, and use the wheel from another folder."""
    session.run("bash", ".ci/wheel", external=True)


@nox.session
def benchmark(session):
    """Run a benchmark: `nox -s benchmark -- framework_overhead 8`; its results go to benchmarks/results."""
    script, *arguments = session.posargs
    session.run("python", f"benchmarks/{script}.py", *arguments)
