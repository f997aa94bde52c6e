"""`langchain-openai` against a running server: chat model, completion model and embeddings, each answer checked.

    CLIENT_BASE_URL=http://127.0.0.1:8000/v1 CLIENT_API_KEY=… python tests/clients/langchain_sdk.py

Embeddings need `check_embedding_ctx_length=False`: by default LangChain sends the token ids of an OpenAI tokenizer,
which no other model understands. With `tiktoken_enabled=False` it cuts long texts by the backbone's own tokenizer.
LangChain keeps only fields that it knows, so the composition of an answer is not to be had through it.
"""

import asyncio
import os
import time

import openai
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

SERVER = {"base_url": os.environ["CLIENT_BASE_URL"], "api_key": os.environ.get("CLIENT_API_KEY", "none")}
QUESTION = "Tell me a story about a dog."
PROMPT = "Once upon a time, there was a little"

listed = openai.OpenAI(**SERVER).models.list().data
BACKBONE = next(one.id for one in listed if one.model_extra["kind"] == "backbone")
TASK = next(one.id for one in listed if one.model_extra["kind"] == "task")

model = ChatOpenAI(model=TASK, temperature=0, max_tokens=16, **SERVER)
writer = OpenAI(model=TASK, temperature=0, max_tokens=16, **SERVER)


def chat() -> None:
    answer = model.invoke([("system", "You tell short stories."), ("human", QUESTION)])

    assert answer.text
    assert answer.usage_metadata["total_tokens"] > answer.usage_metadata["output_tokens"] > 0
    assert answer.response_metadata["finish_reason"] in ("length", "stop")
    assert answer.response_metadata["model_name"] == TASK


def chat_streams() -> None:
    whole = model.invoke(QUESTION)

    chunks = list(model.stream(QUESTION, stream_usage=True))

    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert len([chunk for chunk in chunks if chunk.text]) > 2
    assert total.text == whole.text
    assert total.usage_metadata == whole.usage_metadata


def chat_batches() -> None:
    questions = [f"{QUESTION} {number}" for number in range(8)]

    answers = model.batch(questions)

    assert [answer.text for answer in answers] == [model.invoke(question).text for question in questions]


def chat_async() -> None:
    async def both() -> tuple[str, str]:
        answer = await model.ainvoke(QUESTION)
        return answer.text, "".join([chunk.text async for chunk in model.astream(QUESTION)])

    whole, streamed = asyncio.run(both())

    assert whole == streamed == model.invoke(QUESTION).text


def chain() -> None:
    prompt = ChatPromptTemplate.from_messages([("system", "You tell stories."), ("human", "One about {animal}.")])

    told = (prompt | model | StrOutputParser()).invoke({"animal": "a bear"})

    assert isinstance(told, str)
    assert told


def options() -> None:
    text = model.invoke(QUESTION).text
    composed = ChatOpenAI(model=TASK, temperature=0, max_tokens=16, extra_body={"espalier": {"mode": "none"}}, **SERVER)
    bare = ChatOpenAI(model=BACKBONE, temperature=0, max_tokens=16, **SERVER)

    answer = model.bind(logprobs=True, top_logprobs=2, stop=[text[6:8]]).invoke(QUESTION)

    assert answer.text == text[: text.index(text[6:8])]
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.response_metadata["logprobs"]["content"][0]["top_logprobs"]
    assert composed.invoke(QUESTION).text == bare.invoke(QUESTION).text


def completions() -> None:
    whole = writer.invoke(PROMPT)

    streamed = "".join(writer.stream(PROMPT))
    batch = writer.generate([PROMPT, "The cat"])  # one call with two prompts
    later = asyncio.run(writer.ainvoke(PROMPT))

    assert whole
    assert whole == streamed == batch.generations[0][0].text == later
    assert batch.llm_output["token_usage"]["completion_tokens"] > 16
    assert len(OpenAI(model=TASK, n=3, **SERVER).generate([PROMPT]).generations[0]) == 3


def embeddings() -> None:
    plain = OpenAIEmbeddings(model=TASK, check_embedding_ctx_length=False, **SERVER)

    vectors = plain.embed_documents(["a dog", "the big red ball"])

    assert len(vectors) == 2
    assert vectors[0] != vectors[1]
    assert _near(plain.embed_query("a dog"), vectors[0])
    assert _near(asyncio.run(plain.aembed_query("a dog")), vectors[0])


def embeddings_of_long_texts() -> None:
    folder = os.environ.get("CLIENT_TOKENIZER")
    if folder is None:
        return
    cutting = OpenAIEmbeddings(
        model=TASK, tiktoken_enabled=False, tiktoken_model_name=folder, embedding_ctx_length=64, **SERVER
    )

    vectors = cutting.embed_documents(["a dog " * 100, "a ball"])

    assert len(vectors) == 2
    assert len(vectors[0]) == len(vectors[1])


def _near(left: list[float], right: list[float]) -> bool:
    return all(abs(a - b) < 1e-5 for a, b in zip(left, right, strict=True))


def errors() -> None:
    assert code_of_unknown_model() == "model_not_found"


def code_of_unknown_model() -> str | None:
    try:
        ChatOpenAI(model="nobody", **SERVER).invoke(QUESTION)
    except openai.NotFoundError as error:  # LangChain lets the SDK's errors through
        return error.code
    raise AssertionError("an unknown model was answered")


if __name__ == "__main__":
    for check in (
        chat, chat_streams, chat_batches, chat_async, chain, options, completions, embeddings,
        embeddings_of_long_texts, errors,
    ):  # fmt: skip
        start = time.monotonic()
        print(f"{check.__name__} …", end=" ", flush=True)
        check()
        print(f"{time.monotonic() - start:.2f} s")
