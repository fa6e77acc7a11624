"""Names of dictionaries: paths, the zoo, and repositories of the hub, whose downloader is replaced here."""

import shutil

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from cutaway import dictionaries
from cutaway.core.refuse import Refused
from cutaway.dictionaries import formats
from tests.dictionaries.common import dictionary
from tests.dictionaries.formats.common import D, F, acts

SITE = "resid_post.20"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository `org/repo-res` with two dictionaries in folders, one at its root, and what no one wants."""
    there, here = tmp_path / "there", tmp_path / "models--org--repo-res" / "snapshots" / "1"
    d = dictionary([(F, [SITE], [SITE])], {SITE: D}, "jump")
    for place, name in (("layer_20/width_16k", "gemma_scope"), ("layer_20/width_64k", "gemma_scope"),
                        ("", "saelens"), ("old/resid", "dictionary_learning"), ("llama", "llama_scope")):  # fmt: skip
        one = dictionary([(F, [SITE], [SITE])], {SITE: D}) if name == "llama_scope" else d
        formats.write(one, there / place, name)
    for name in ("model.py", "layer_20/width_16k/evil.pkl", "layer_20/width_16k/more/sae.safetensors"):
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)

    def download(repository, revision, allow_patterns, ignore_patterns):
        assert revision in (None, "1")
        if repository != "org/repo-res":
            raise errors.LocalEntryNotFoundError("no network")
        files = [p.relative_to(there).as_posix() for p in there.rglob("*") if p.is_file()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(there / name, here / name)
        here.mkdir(parents=True, exist_ok=True)
        return str(here)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return lambda: sorted(p.relative_to(here).as_posix() for p in here.rglob("*") if p.is_file())


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("layer_20/width_16k", ["layer_20/width_16k/params.npz"]),
        ("layer_20/width_64k/params.npz", ["layer_20/width_64k/params.npz"]),
        ("", ["cfg.json", "sae_weights.safetensors"]),
        ("old/resid", ["old/resid/ae.pt", "old/resid/config.json"]),
        ("old/resid/ae.pt", ["old/resid/ae.pt", "old/resid/config.json"]),
        ("llama", ["llama/checkpoints/final.safetensors", "llama/hyperparams.json"]),
    ],
)
def test_only_what_is_needed_is_fetched_from_the_hub(name, files, hub):
    d = dictionaries.load(f"org/repo-res/{name}".rstrip("/"))
    assert d.reads == (SITE,)
    assert hub() == files
    assert d.about["path"] == f"org/repo-res/{name}".rstrip("/")
    assert formats.detect(f"org/repo-res/{name}".rstrip("/")) == [d.about["format"]]
    pinned = f"org/repo-res@1/{name}".rstrip("/")  # a record names the commit, which does not move
    assert d.made is not None
    assert d.made.python == f"ca.dictionaries.load({pinned!r})"
    assert dictionaries.load(pinned).fingerprint() == d.fingerprint()


def test_what_the_hub_does_not_have_is_refused(hub):
    with pytest.raises(Refused, match="has no layer_99"):
        dictionaries.load("org/repo-res/layer_99")
    with pytest.raises(Refused, match="cannot be reached"):
        dictionaries.load("org/other")


def test_paths_here_are_no_names_of_repositories(hub, tmp_path):
    (tmp_path / "runs").mkdir()
    for name in (tmp_path / "runs" / "x", "runs/sae", "./runs/sae", "runs/../sae", "alone"):
        with pytest.raises(Refused, match="there is nothing"):
            dictionaries.load(name)
    formats.write(dictionary([(F, [SITE], [SITE])], {SITE: D}), tmp_path / "org" / "repo-res", "saelens")
    assert float(dictionaries.load("org/repo-res").forward(acts()).abs().sum()) > 0
    assert hub() == []


def test_offline_the_hub_is_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(Refused, match="fetch it where there is internet"):
        dictionaries.load("org/repo/layer_1")
