"""The cache folder: what another host that shares it has made first is taken as it is."""

from dsft.cache import build_once


def test_the_folder_of_another_host_that_was_first_is_taken(monkeypatch, tmp_path):
    monkeypatch.setenv("DSFT_CACHE", str(tmp_path))

    def build(folder):
        (folder / "file").write_text("ours")
        (tmp_path / "made").mkdir()  # by a host whose lock this one does not see
        (tmp_path / "made" / "file").write_text("theirs")

    assert (build_once("made", build) / "file").read_text() == "theirs"
    assert not list(tmp_path.glob("*.tmp"))
