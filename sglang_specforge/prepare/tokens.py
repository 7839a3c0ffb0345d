"""Messages into token ids, and which of them an assistant would have to produce."""

from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from sglang_specforge.prepare.conversations import Message, Skipped

LossOn = Literal["all", "last"]
_UNSTABLE = "the chat template renders a turn differently once others follow"


class ChatTokens:
    """Applies the tokenizer's chat template.

    Assistants' tokens are those that the template marks as generated. Where it marks none, they are what each
    assistant's turn adds to the prompt before it; a template that renders the prompt differently once the answer
    follows is found out, and the conversation skipped.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> None:
        self._tokenizer, self._loss_on = tokenizer, loss_on
        self.vocab_size = len(tokenizer)
        self._marks = bool(tokenizer.chat_template) and "generation" in _statements(tokenizer.get_chat_template())

    def encode(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation and their loss mask. Raises Skipped."""
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise Skipped("no assistant's turn")
        messages = messages[: turns[-1] + 1]
        if self._marks:
            ids, mask = self._marked(messages)
        else:
            ids, mask = self._by_prefixes(messages, turns)
        return (ids, mask) if self._loss_on == "all" else (ids, _last_run(mask))

    def prompt(self, messages: list[Message]) -> list[int]:
        """Token ids that an assistant's answer would follow."""
        return self._render(messages, add_generation_prompt=True)

    def mask_of_prompt(self, messages: list[Message], prompt_ids: list[int]) -> list[bool]:
        """Loss mask of the prompt after ``messages``: their assistants' turns. Raises Skipped."""
        if self._loss_on == "last" or not any(message["role"] == "assistant" for message in messages):
            return [False] * len(prompt_ids)
        ids, mask = self.encode(messages)
        if prompt_ids[: len(ids)] != ids:
            raise Skipped(_UNSTABLE)
        return mask + [False] * (len(prompt_ids) - len(ids))

    def answer(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def encode_text(self, text: str) -> tuple[list[int], list[bool]]:
        """Plain text is learnt as a whole."""
        ids = self._tokenizer(text).input_ids
        return ids, [True] * len(ids)

    def _marked(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        found = self._apply(messages, return_dict=True, return_assistant_tokens_mask=True)
        return list(found["input_ids"]), [bool(m) for m in found["assistant_masks"]]

    def _by_prefixes(self, messages: list[Message], turns: list[int]) -> tuple[list[int], list[bool]]:
        ids, mask = self._render(messages), []
        for turn in turns:
            before, after = self.prompt(messages[:turn]), self._render(messages[: turn + 1])
            if after[: len(before)] != before or ids[: len(after)] != after:
                raise Skipped(_UNSTABLE)
            mask += [False] * (len(before) - len(mask)) + [True] * (len(after) - len(before))
        return ids, mask + [False] * (len(ids) - len(mask))

    def _render(self, messages: list[Message], add_generation_prompt: bool = False) -> list[int]:
        return list(self._apply(messages, return_dict=True, add_generation_prompt=add_generation_prompt)["input_ids"])

    def _apply(self, messages: list[Message], **kwargs: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=True, **kwargs)
        except Exception as error:  # templates raise what their authors chose
            raise Skipped(f"the chat template refuses it: {error}") from error


def _statements(template: str) -> set[str]:
    return {part.strip(" -").partition(" ")[0] for part in template.replace("%}", "{%").split("{%")}


def _last_run(mask: list[bool]) -> list[bool]:
    end = len(mask) - mask[::-1].index(True) if True in mask else 0
    start = end
    while start and mask[start - 1]:
        start -= 1
    return [start <= i < end for i in range(len(mask))]
