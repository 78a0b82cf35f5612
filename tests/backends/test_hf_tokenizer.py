"""The tokenizer: template, stop ids, padding id."""

from __future__ import annotations

import warnings

import pytest
from conftest import CHAT_TEMPLATE, END_OF_TEXT, END_OF_TURN, SPECIAL_TOKENS, VOCAB_SIZE, make_tokenizer

from opd_lightning.backends.hf import HFTokenizer

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is 1+1?"}]


def test_rendering_ends_with_the_generation_header():
    tokenizer = HFTokenizer(make_tokenizer())
    text = tokenizer.decode(tokenizer.render(MESSAGES), skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nwhat is 1+1?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_template_variables_are_passed_on():
    tokenizer = HFTokenizer(make_tokenizer(), template_kwargs={"enable_thinking": False})
    tokenizer.check()
    assert tokenizer.decode(tokenizer.render(MESSAGES), skip_special_tokens=False).endswith("<think></think>")


def test_a_template_may_be_given_as_text_or_file(tmp_path):
    template = "{{ '<|im_start|>' }}{% for m in messages %}{{ m['content'] }}!{% endfor %}"
    file = tmp_path / "chat.jinja"
    file.write_text(template)
    for given in (template, str(file)):
        tokenizer = HFTokenizer(make_tokenizer(), chat_template=given)
        assert tokenizer.decode(tokenizer.render(MESSAGES)) == "be brief!what is 1+1?!"
    with pytest.raises(ValueError, match=r"student\.chat_template: 'nowhere\.jinja' is neither a template .* nor an"):
        HFTokenizer(make_tokenizer(), chat_template="nowhere.jinja")
    file.write_text("no template")
    with pytest.raises(ValueError, match=r"student\.chat_template: '.*' holds no template"):
        HFTokenizer(make_tokenizer(), chat_template=str(file))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"student\.chat_template: the tokenizer has no chat template.*Give one as text or as a file"),
        ("{{ raise_exception('no system role') }}", r"roles \['system', 'user'\] failed: no system role"),
        ("{% for %}", r"student\.chat_template: rendering .* failed: "),
        ("{{ messages[0]['content'] + 1 }}", r"student\.chat_template: rendering .* failed: "),
        ("{{ '' }}", r"student\.chat_template: 2 messages render to nothing"),
    ],
)
def test_template_mistakes_are_explained(template, message):
    tokenizer = HFTokenizer(make_tokenizer(chat_template=None), chat_template=template)
    with pytest.raises(ValueError, match=message):
        tokenizer.render(MESSAGES)


def test_an_unused_template_variable_is_warned_about():
    with pytest.warns(UserWarning, match=r"student\.template_kwargs: the chat template does not use 'enable_thought'"):
        HFTokenizer(make_tokenizer(), template_kwargs={"enable_thought": True}).check()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HFTokenizer(make_tokenizer(), template_kwargs={"enable_thinking": True}).check()
    assert "enable_thinking" in CHAT_TEMPLATE


def test_stop_ids_are_the_sorted_union_of_all_sources():
    assert HFTokenizer(make_tokenizer()).stop_ids == (END_OF_TURN,)
    tokenizer = HFTokenizer(
        make_tokenizer(), eos_ids=[END_OF_TEXT, END_OF_TURN], extra_stop_tokens=["!", 40, "<|im_end|>"]
    )
    assert tokenizer.stop_ids == tuple(sorted({END_OF_TEXT, END_OF_TURN, tokenizer.vocabulary["!"], 40}))


def test_an_impossible_stop_id_is_refused():
    with pytest.raises(ValueError, match=r"student\.extra_stop_tokens: '<\|done\|>' is not one token"):
        HFTokenizer(make_tokenizer(), extra_stop_tokens=["<|done|>"])
    with pytest.raises(
        ValueError, match=rf"stop ids \[{VOCAB_SIZE}\] are outside the vocabulary of {VOCAB_SIZE} tokens"
    ):
        HFTokenizer(make_tokenizer(), eos_ids=[VOCAB_SIZE]).check()


def test_padding_id_is_the_pad_token_or_a_stop_id():
    assert HFTokenizer(make_tokenizer()).pad_id == SPECIAL_TOKENS.index("<|pad|>")
    assert HFTokenizer(make_tokenizer(pad_token=None)).pad_id == END_OF_TURN
    assert HFTokenizer(make_tokenizer(pad_token="<|im_end|>")).pad_id == END_OF_TURN


def test_there_may_be_no_stop_token_and_no_padding():
    tokenizer = HFTokenizer(make_tokenizer(eos_token=None, pad_token=None))
    tokenizer.check()
    assert tokenizer.stop_ids == ()
    assert tokenizer.pad_id == 0


# ------------------------------------------------------------------------------------------------------ raw prompts

RAW = ({"role": "raw", "content": "1+1="},)


def with_bos(**options):
    """A tokenizer that puts "<|endoftext|>" in front of plain text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(bos_token="<|endoftext|>", **options)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", END_OF_TEXT)]
    )
    return tokenizer


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE], ids=["base model", "with template"])
def test_a_raw_prompt_is_plain_text(template):
    tokenizer = HFTokenizer(make_tokenizer(chat_template=template))
    assert tokenizer.render(RAW) == tokenizer.encode("1+1=")


def test_a_raw_prompt_begins_with_the_bos_that_the_tokenizer_adds():
    tokenizer = HFTokenizer(with_bos(chat_template=None))
    tokenizer.check()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer.render(RAW) == [END_OF_TEXT, *tokenizer.encode("1+1=")]
        written = ({"role": "raw", "content": "<|endoftext|>1+1="},)
        assert tokenizer.render(written) == tokenizer.render(RAW)  # one is enough


@pytest.mark.parametrize("messages", [MESSAGES, RAW], ids=["chat", "raw"])
def test_a_missing_bos_is_said_once(messages):
    tokenizer = HFTokenizer(make_tokenizer(bos_token="<|endoftext|>"))
    tokenizer.check()
    with pytest.warns(UserWarning, match=r"student\.chat_template: .* token '<\|endoftext\|>', but prompts .* begin"):
        tokenizer.render(messages)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer.render(messages)


def test_a_raw_prompt_stands_alone_and_says_something():
    tokenizer = HFTokenizer(make_tokenizer())
    with pytest.raises(ValueError, match=r"role 'raw' is a whole prompt .* got roles \['system', 'raw'\]"):
        tokenizer.render([MESSAGES[0], *RAW])
    with pytest.raises(ValueError, match=r"1 messages render to nothing"):
        tokenizer.render([{"role": "raw", "content": ""}])


def test_vocab_size_counts_added_tokens():
    wrapped = make_tokenizer()
    assert HFTokenizer(wrapped).vocab_size == VOCAB_SIZE
    wrapped.add_tokens(["<|new|>"])
    assert HFTokenizer(wrapped).vocab_size == VOCAB_SIZE + 1


def test_decoding_keeps_spaces_and_drops_special_tokens_on_request():
    tokenizer = HFTokenizer(make_tokenizer())
    ids = [tokenizer.vocabulary[character] for character in " a , b  ."] + [END_OF_TURN]
    assert tokenizer.decode(ids) == " a , b  ."
    assert tokenizer.decode(ids, skip_special_tokens=False) == " a , b  .<|im_end|>"
    assert tokenizer.name_of(END_OF_TURN) == "<|im_end|>"
    assert tokenizer.name_of(10**6) == str(10**6)
