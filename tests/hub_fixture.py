"""The stand-in hub in a test's own process: huggingface_hub reads its constants when called, so they are set there."""

import pytest
from hub_stand_in import TOKEN, Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running stand-in that huggingface_hub talks to; retries do not wait."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    server = Hub()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(_http.time, "sleep", lambda _: None)
    yield server
    server.close()
