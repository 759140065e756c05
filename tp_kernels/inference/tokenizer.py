"""Tokenizers of checkpoints: ``load_tokenizer(path)`` for Hugging Face folders and GGUF files.

A thin layer over the ``tokenizers`` library. Token ids equal those that transformers gives for the same files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from tp_kernels.checkpoint.errors import CheckpointError
from tp_kernels.inference.chat_template import render_chat

__all__ = ["StreamDecoder", "Tokenizer", "load_tokenizer"]

_MAX_TOKENIZER_BYTES = 256 << 20

# Special tokens that end a turn or a document in every model that has them, whether its config says so or not.
_END_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end|>",
    "<end_of_turn>",
)
_SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        bos_id: beginning-of-sequence id, or None.
        eos_ids: every id that ends a text or a turn.
        vocab_size: number of tokens, added ones included.
        chat_template: Jinja source, or None.
        special_tokens: texts by role: ``{"bos_token": "<s>", ...}``.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        add_bos: bool | None = None,
        add_eos: bool = False,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ):
        """Wrap a ``tokenizers.Tokenizer``.

        Args:
            backend: the library's tokenizer.
            bos_id, eos_ids, chat_template, special_tokens: see the class; special tokens of the backend with a
                well-known end-of-text name are added to ``eos_ids``.
            add_bos: ``encode`` puts ``bos_id`` first; None leaves it to the backend's post-processor.
            add_eos: ``encode`` puts the first of ``eos_ids`` last.
        """
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special_ids = {
            token.content: index for index, token in backend.get_added_tokens_decoder().items() if token.special
        }
        eos = list(dict.fromkeys(eos_ids))
        self.bos_id = bos_id
        self.eos_ids: set[int] = set(eos) | {self._special_ids[t] for t in _END_TOKENS if t in self._special_ids}
        self._prefix = [bos_id] if add_bos and bos_id is not None else []
        self._suffix = eos[:1] if add_eos else []
        self._post_process = add_bos is None
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens written in it are recognised.

        Args:
            text: any string, the empty one included.
            add_special_tokens: put BOS (and EOS) around it if the model does.
        """
        if not isinstance(text, str):
            raise ValueError(f"expected a string to encode, got {type(text).__name__}")
        ids = self._backend.encode(text, add_special_tokens=add_special_tokens and self._post_process).ids
        return self._prefix + ids + self._suffix if add_special_tokens else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that form no character become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def chat(
        self, messages: str | Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Token ids of a conversation in the model's own chat template.

        Args:
            messages: dicts with "role" and "content", or one string from the user.
            add_generation_prompt: end with the opening of the assistant's turn.
            variables: further names for the template, for example ``enable_thinking=False`` or ``tools=[...]``.
        Raises:
            ValueError: the model has no chat template, or the template refuses the messages.
        """
        return self.encode(self.render_chat(messages, add_generation_prompt, **variables), add_special_tokens=False)

    def render_chat(
        self, messages: str | Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text that ``chat`` encodes."""
        if self.chat_template is None:
            raise ValueError(
                "this model has no chat template; use encode() with a prompt in the form it was trained on"
            )
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return render_chat(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            **{**self.special_tokens, **variables},
        )

    def stream(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder for tokens that come one by one."""
        return StreamDecoder(self, skip_special_tokens)


class StreamDecoder:
    """Text of tokens as they come: ``put`` returns what has become certain, holding back incomplete characters.

    The pieces concatenate to what ``decode`` gives for all tokens at once.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._shown = 0  # of self._ids, tokens whose text has been returned

    def put(self, token: int) -> str:
        """Take one token; the text that is now complete, often ""."""
        self._ids.append(int(token))
        return self._emit(final=False)

    def flush(self) -> str:
        """What was held back, as the stream has ended; incomplete characters become U+FFFD."""
        return self._emit(final=True)

    def _emit(self, final: bool) -> str:
        # The tokens before stay in the window: many vocabularies write the blank before a word only after a token.
        before = self._tokenizer.decode(self._ids[: self._shown], self._skip)
        text = self._tokenizer.decode(self._ids, self._skip)
        if len(text) <= len(before) or (text.endswith("\ufffd") and not final):
            return ""
        self._ids = self._ids[self._shown :] if self._shown else self._ids
        self._shown = len(self._ids)
        return text[len(before) :]


def load_tokenizer(path: str | os.PathLike, *, split_digits: bool = False) -> Tokenizer:
    """Load the tokenizer of a checkpoint.

    Args:
        path: Hugging Face folder with ``tokenizer.json``, a GGUF file, or a folder with nothing but one GGUF file.
        split_digits: for GGUF files whose pre-tokenizer cuts numbers into digits (SmolLM2): do so before everything
            else, as the model's original tokenizer does. The default gives the ids that transformers gives for a GGUF
            file, which differ where several blanks stand before a number.
    Raises:
        CheckpointError: there is no tokenizer, its files are malformed, or its kind is not supported.
    """
    path = os.path.expanduser(os.fspath(path))
    if os.path.isdir(path) and not os.path.lexists(os.path.join(path, "tokenizer.json")):
        ggufs = sorted(name for name in os.listdir(path) if name.endswith(".gguf"))
        if len(ggufs) == 1:
            path = os.path.join(path, ggufs[0])
        else:
            raise CheckpointError(
                "has no tokenizer.json; make one with transformers: AutoTokenizer.from_pretrained(folder)"
                ".save_pretrained(folder)",
                file=path,
            )
    return _from_folder(path) if os.path.isdir(path) else _from_gguf(path, split_digits)


def _from_gguf(path: str, split_digits: bool) -> Tokenizer:
    from tp_kernels.checkpoint.gguf_header import open_gguf
    from tp_kernels.inference.gguf_tokenizer import build_gguf_tokenizer

    file, header = open_gguf(path)
    file.close()
    backend, settings = build_gguf_tokenizer(header.metadata, file=path, split_digits=split_digits)
    return Tokenizer(
        backend,
        bos_id=settings["bos_token_id"],
        eos_ids=settings["eos_token_ids"],
        add_bos=settings["add_bos_token"],
        add_eos=settings["add_eos_token"],
        chat_template=settings["chat_template"],
        special_tokens=settings["special_tokens"],
    )


def _from_folder(path: str) -> Tokenizer:
    from tp_kernels.checkpoint.hf_folder import read_json_file

    file = os.path.join(path, "tokenizer.json")
    if not os.path.isfile(file) or os.path.getsize(file) > _MAX_TOKENIZER_BYTES:
        raise CheckpointError(f"is not a file of at most {_MAX_TOKENIZER_BYTES} bytes", file=file)
    try:
        backend = Backend.from_file(file)
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"is not a tokenizer: {error}", file=file) from error

    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if os.path.lexists(os.path.join(path, name)):
            settings |= read_json_file(os.path.join(path, name))
    _add_missing(backend, settings.get("added_tokens_decoder"), os.path.join(path, "tokenizer_config.json"))
    special = {key: text for key in _SPECIAL_KEYS if (text := _text(settings.get(key))) is not None}

    eos_ids = [backend.token_to_id(special["eos_token"])] if "eos_token" in special else []
    for name in ("generation_config.json", "config.json"):
        if os.path.lexists(os.path.join(path, name)):
            value = read_json_file(os.path.join(path, name)).get("eos_token_id")
            eos_ids += [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]
            break
    return Tokenizer(
        backend,
        bos_id=backend.token_to_id(special["bos_token"]) if "bos_token" in special else None,
        eos_ids=[i for i in eos_ids if i is not None],
        chat_template=_chat_template(path, settings.get("chat_template")),
        special_tokens=special,
    )


def _text(token: Any) -> str | None:
    """Content of a token that a config gives as a string or as an ``AddedToken`` dict."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _add_missing(backend: Backend, decoder: Any, file: str) -> None:
    """Tokens that only ``tokenizer_config.json`` knows; their ids must be the next free ones."""
    if not isinstance(decoder, Mapping):
        return
    for key, token in sorted(decoder.items(), key=lambda item: int(item[0]) if str(item[0]).isdigit() else -1):
        text = _text(token)
        if text is None or not str(key).isdigit():
            raise CheckpointError(f"added_tokens_decoder has a bad entry {key!r}", file=file)
        if backend.token_to_id(text) is None:
            flags = {
                name: bool(token.get(name)) for name in ("special", "lstrip", "rstrip", "single_word", "normalized")
            }
            backend.add_tokens([AddedToken(text, **flags)])
            if backend.token_to_id(text) != int(key):
                raise CheckpointError(f"added token {text!r} cannot have the id {key}", file=file)


def _chat_template(path: str, configured: Any) -> str | None:
    from tp_kernels.checkpoint.source import CountedFile

    separate = os.path.join(path, "chat_template.jinja")
    if os.path.lexists(separate):
        file = CountedFile(separate)
        try:
            return file.read(0, min(file.size, 16 << 20)).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"is not valid UTF-8: {error}", file=separate) from error
        finally:
            file.close()
    if isinstance(configured, list):  # several named templates
        named = {item.get("name"): item.get("template") for item in configured if isinstance(item, Mapping)}
        configured = named.get("default")
    return configured if isinstance(configured, str) else None
