import pytest
import timm_source


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(timm_source, "CACHE", tmp_path / "cache")
    monkeypatch.delenv("SSMVISION_TIMM_TESTS", raising=False)


def test_without_network_the_skip_is_loud(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.warns(UserWarning, match="NOT CHECKED"), pytest.raises(pytest.skip.Exception, match="NOT CHECKED"):
        timm_source.timm_tests()


def test_a_failing_download_fails(monkeypatch):
    monkeypatch.setattr(timm_source.sys, "executable", "false")
    with pytest.raises(pytest.fail.Exception, match="could not fetch"):
        timm_source.timm_tests()


def test_the_tests_of_another_timm_are_refused(monkeypatch, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_models.py").touch()
    (tmp_path / "PKG-INFO").write_text("Name: timm\nVersion: 0.0.1\n")
    monkeypatch.setenv("SSMVISION_TIMM_TESTS", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match="is not the unpacked source distribution"):
        timm_source.timm_tests()
