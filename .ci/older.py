"""An older commit beside the working tree, for .ci/same and .ci/pace."""
import contextlib
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def older(commit):
    """The folder of a checkout of `commit`, which is gone afterwards."""
    with tempfile.TemporaryDirectory() as tmp:
        tree = Path(tmp) / "old"
        subprocess.run(["git", "worktree", "add", "-q", "--detach", str(tree), commit], cwd=HERE, check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=HERE, check=True)
