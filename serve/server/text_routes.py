"""``/v1/models``, ``/tokenize`` and ``/detokenize``."""

from fastapi import APIRouter

from jaxpaged.errors import InvalidRequestError
from jaxpaged.serve.server.chat_completions import plain_messages
from jaxpaged.serve.server.failures import RequestFailure
from jaxpaged.serve.server.protocol import DetokenizeRequest, TokenizeRequest
from jaxpaged.serve.server.responses import DetokenizeResponse, ModelCard, ModelList, TokenizeResponse
from jaxpaged.serve.server.service import Service


def text_routes(service: Service) -> APIRouter:
    """The routes."""
    router = APIRouter()

    def card(name: str) -> ModelCard:
        limit = service.engine.config.max_model_len if service.engine.is_started else None
        return ModelCard(id=name, created=service.created, max_model_len=limit)

    @router.get("/v1/models")
    async def list_models() -> ModelList:
        """The served model, under each of its names."""
        return ModelList(data=[card(name) for name in service.names])

    @router.get("/v1/models/{model:path}")
    async def get_model(model: str) -> ModelCard:
        """One of them."""
        return card(service.check_model(model))

    @router.post("/tokenize", response_model_exclude_none=True)
    async def tokenize(body: TokenizeRequest) -> TokenizeResponse:
        """Token ids of a prompt, or of what the chat template makes of messages."""
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestFailure(400, "needs either prompt or messages", param="prompt")
        text, special = body.prompt, body.add_special_tokens is not False
        if body.messages is not None:
            arguments = body.chat_template_kwargs or {}
            messages, special = plain_messages(body.messages), body.add_special_tokens is True
            text = await service.render(messages, arguments, add_generation_prompt=body.add_generation_prompt)
        assert text is not None, "checked"
        ids = await service.encode(text, add_special_tokens=special)
        strings = [service.token_texts.text(token_id) for token_id in ids] if body.return_token_strs else None
        limit = service.engine.config.max_model_len
        return TokenizeResponse(count=len(ids), max_model_len=limit, tokens=ids, token_strs=strings)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> DetokenizeResponse:
        """The text of token ids."""
        service.check_model(body.model)
        vocab_size = service.engine.model_config.vocab_size
        for token_id in body.tokens:
            if not 0 <= token_id < vocab_size:
                reason = f"is not a token id of this model (vocab_size={vocab_size})"
                raise InvalidRequestError("tokens", token_id, reason)
        return DetokenizeResponse(prompt=service.tokenizer.decode(body.tokens, skip_special_tokens=False))

    return router
