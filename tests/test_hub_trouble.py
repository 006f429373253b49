"""A hub that refuses, fails or is slow is not called offline: the sentence says what it answered."""

import httpx
import pytest
from hub_fixture import hub  # noqa: F401
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError

from sae_train.data.documents import find_documents
from sae_train.data.pretrained import hub_trouble, load_errors, locate
from sae_train.errors import UserError

ANSWERS = {429: "too many requests", 500: "the hub has failed", 503: "HTTP 503", 403: "no right"}


@pytest.fixture
def online(hub, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return hub


@pytest.mark.parametrize("status", ANSWERS)
@pytest.mark.parametrize(("kind", "open_it"), [("models", locate), ("datasets", find_documents)])
def test_what_the_hub_answers_is_said(kind, open_it, status, online):
    online.faults[("GET", f"/api/{kind}/")] = status
    with pytest.raises(UserError, match=ANSWERS[status]) as error:
        open_it("someone/thing")
    assert "cannot be reached" not in str(error.value) and "no network" not in str(error.value)


@pytest.mark.parametrize(("kind", "open_it"), [("models", locate), ("datasets", find_documents)])
def test_a_connection_that_breaks_off_is_no_hub(kind, open_it, online):
    online.faults[("GET", f"/api/{kind}/")] = "cut"
    with pytest.raises(UserError, match="the hub cannot be reached"):
        open_it("someone/thing")


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_slow_hub_is_there(kind, monkeypatch):
    def wait(*_, **__):
        raise httpx.ReadTimeout("The read operation timed out")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(HfApi, "repo_info", wait)
    assert hub_trouble("someone/thing", kind) == ""


@pytest.mark.parametrize(("kind", "open_it"), [("model", locate), ("dataset", find_documents)])
def test_what_is_gated_is_said_to_be_so(kind, open_it, monkeypatch):
    def refuse(*_, **__):
        raise GatedRepoError("gated", response=httpx.Response(403, request=httpx.Request("GET", "http://hub")))

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(HfApi, "repo_info", refuse)
    with pytest.raises(UserError, match=f"the {kind} 'someone/thing' is gated: ask for access"):
        open_it("someone/thing")


def test_what_the_cache_holds_serves_while_the_hub_fails(online, tmp_path):
    snapshot = tmp_path / "hub-cache" / "models--someone--thing" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    online.faults[("GET", "/api/models/")] = 503
    assert str(tmp_path) in constants.HF_HUB_CACHE
    assert locate("someone/thing") == ("someone/thing", {"local_files_only": True})


@pytest.mark.parametrize("name", ["someone/thing", "smollm2"])
def test_a_file_that_the_hub_refuses_is_told_by_its_reason(name, monkeypatch):
    monkeypatch.setattr("sae_train.data.pretrained.Named.installed", lambda _: None)
    with pytest.raises(UserError, match="the token has no right"), load_errors(name):
        raise OSError("a long story") from GatedRepoError(
            "gated", response=httpx.Response(403, request=httpx.Request("GET", "http://hub"))
        )
