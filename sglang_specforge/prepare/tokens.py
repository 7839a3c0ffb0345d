"""Conversations into token ids, and which of them an assistant would have to produce."""

from collections import Counter
from typing import Any, Literal, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from sglang_specforge.prepare.conversations import Conversation, Skipped

LossOn = Literal["all", "last"]
T = TypeVar("T")


class Encoded(NamedTuple):
    """A sequence of tokens and its loss mask; an image that it shows takes the tokens of its place."""

    ids: list[int]
    mask: list[bool]
    images: list[str]  # references, in order

    @classmethod
    def answer(cls, prompt: list[int], answer: list[int], images: list[str]) -> "Encoded":
        return cls(prompt + answer, [False] * len(prompt) + [True] * len(answer), images)


class ChatTokens:
    """Applies the tokenizer's chat template, with ``settings`` as in ``chat_template_kwargs`` of a request to SGLang.

    Assistants' tokens are those that the template marks as generated. Where it marks none, they are what each
    assistant's turn adds to the prompt before it. A template may render a turn differently once others follow, as
    those do that leave out what was thought before: then a conversation is several sequences, each ending with the
    turns that it holds as they were produced.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn, settings: dict[str, Any] | None = None
    ) -> None:
        self._tokenizer, self._loss_on, self._settings = tokenizer, loss_on, settings or {}
        self.vocab_size = len(tokenizer)
        self._marks = bool(tokenizer.chat_template) and "generation" in _statements(tokenizer.get_chat_template())
        self._added = tokenizer.added_tokens_decoder
        self._special = {i for i, token in self._added.items() if token.special}

    def encode(self, conversation: Conversation) -> list[Encoded]:
        """Raises Skipped."""
        turns = conversation.turns
        if not turns:
            raise Skipped("no assistant's turn")
        if not self._marks:
            return self.joined([self.turn(conversation, turn) for turn in self._learnt(turns)])
        conversation = conversation.until(turns[-1] + 1)
        found = self._apply(conversation, return_assistant_tokens_mask=True)
        mask = [bool(m) for m in found["assistant_masks"]]
        mask = mask if self._loss_on == "all" else _last_run(mask)
        return [Encoded(list(found["input_ids"]), mask, conversation.images)]

    def turn(self, conversation: Conversation, turn: int) -> Encoded:
        """One assistant's turn, after its prompt. Raises Skipped."""
        prompt, ids = self.prompt(conversation.until(turn)), self._render(conversation.until(turn + 1))
        if ids[: len(prompt)] != prompt:
            raise Skipped("the chat template renders a prompt differently once its answer follows")
        return Encoded.answer(prompt, ids[len(prompt) :], conversation.until(turn).images)

    def joined(self, turns: list[Encoded]) -> list[Encoded]:
        """Turns of one conversation as few sequences: one that begins with the whole of the one before holds it."""
        sequences: list[Encoded] = []
        for ids, mask, images in self._learnt(turns):
            if sequences and ids[: len(sequences[-1].ids)] == sequences[-1].ids:
                held = sequences.pop().mask
                mask = held + mask[len(held) :]
            sequences.append(Encoded(ids, mask, images))
        return sequences

    def prompt(self, conversation: Conversation) -> list[int]:
        """Token ids that an assistant's answer would follow."""
        return self._render(conversation, add_generation_prompt=True)

    def text(self, answer: list[int]) -> str:
        """What an answer is as a message. Raises Skipped where the text would lose what its special tokens say."""
        end = len(answer)
        while end and answer[end - 1] in self._special:
            end -= 1
        if self._special.intersection(answer[:end]):
            raise Skipped("turns after one with special tokens inside")
        return self._tokenizer.decode(answer[:end])

    def encode_text(self, text: str) -> Encoded:
        """Plain text is learnt as a whole."""
        return Encoded.answer([], self._tokenizer(text).input_ids, [])

    def _learnt(self, turns: list[T]) -> list[T]:
        return turns if self._loss_on == "all" else turns[-1:]

    def _render(self, conversation: Conversation, add_generation_prompt: bool = False) -> list[int]:
        return list(self._apply(conversation, add_generation_prompt=add_generation_prompt)["input_ids"])

    def _apply(self, conversation: Conversation, **kwargs: Any) -> Any:
        found = self._rendered(conversation, **kwargs)
        if images := conversation.images:
            without = self._rendered(_unillustrated(conversation), **kwargs)
            more = Counter(found["input_ids"]) - Counter(without["input_ids"])
            # One that takes content for text shows how Python writes the parts.
            if not any(token in self._added and count >= len(images) for token, count in more.items()):
                raise Skipped("the chat template has no place for images")
        return found

    def _rendered(self, conversation: Conversation, **kwargs: Any) -> Any:
        given = {"tokenize": True, "return_dict": True, "tools": conversation.tools}
        try:
            return self._tokenizer.apply_chat_template(conversation.messages, **{**self._settings, **given, **kwargs})
        except Exception as error:  # templates raise what their authors chose
            raise Skipped(f"the chat template refuses it: {error}") from error


def _unillustrated(conversation: Conversation) -> Conversation:
    messages = [
        {**message, "content": [part for part in message["content"] if part["type"] != "image"]}
        if isinstance(message["content"], list)
        else message
        for message in conversation.messages
    ]
    return conversation._replace(messages=messages)


def _statements(template: str) -> set[str]:
    return {part.strip(" -").partition(" ")[0] for part in template.replace("%}", "{%").split("{%")}


def _last_run(mask: list[bool]) -> list[bool]:
    end = len(mask) - mask[::-1].index(True) if True in mask else 0
    start = end
    while start and mask[start - 1]:
        start -= 1
    return [start <= i < end for i in range(len(mask))]
