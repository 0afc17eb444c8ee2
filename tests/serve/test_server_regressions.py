"""What clients that nobody here wrote stumbled over; ``make client-test`` runs them."""

from typing import Any

import pytest

from tests.serve.live_server import live_server

KEY = "a-key-for-tests"


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"prompt": [5] * 200}, {}),
        ({"prompt": "the cat " * 100_000}, {}),
        ({"prompt": [5] * 20}, {"max_prompt_tokens": 10}),
    ],
    ids=["tokens", "characters", "a limit of the server"],
)
def test_clients_know_that_a_prompt_is_too_long_by_its_words(
    fields: dict[str, Any], options: dict[str, Any]
) -> None:
    """Whatever the code says, litellm and LangChain look for these words to raise exceptions of their own."""
    with live_server(**options) as server:
        response = server.post("/v1/completions", **fields)
        assert response.status_code == 400
        error = response.json()["error"]
    assert "prompt is too long" in error["message"]
    assert "this model's maximum context length is" in error["message"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


def test_the_schema_says_what_needs_a_key() -> None:
    """schemathesis then checks that it does."""
    with live_server(api_key=[KEY]) as server:
        headers = {"Authorization": f"Bearer {KEY}"}
        schema = server.client.get("/openapi.json", headers=headers).json()
        open_paths = []
        for path, operations in schema["paths"].items():
            for method, operation in operations.items():
                answer = server.client.request(method, path.format(model="tiny"), json={})
                assert (answer.status_code == 401) == ("security" in operation), path
                open_paths += [path] if "security" not in operation else []
    assert open_paths == ["/health"]
    assert schema["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}


def test_the_schema_of_an_open_server_asks_for_no_key() -> None:
    with live_server() as server:
        schema = server.client.get("/openapi.json").json()
    assert "securitySchemes" not in schema["components"]
    assert not any("security" in one for path in schema["paths"].values() for one in path.values())
