"""Rendering as transformers renders, and refusing what cannot or must not be rendered."""

import re

import pytest
from tokenizers_for_tests import byte_level, saved

from furiosa_llm.errors import ArtifactError, InvalidRequestError
from furiosa_llm.text import chat_template
from furiosa_llm.text.chat_template import render_chat
from furiosa_llm.text.tokenizer import Tokenizer

CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\nBe kind<|im_end|>\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
TRIMMING = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'tool' %}{% continue %}{% endif %}"
    "[{{ m.role }}]{{ m.content | trim }}[/]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOOLS = (
    "{% for tool in tools or [] %}{{ tool | tojson(indent=2) }}{{ tool | tojson }}\n{% endfor %}"
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n"
    "{{ m.tool_calls is defined }}{% endfor %}{{ documents is none }}"
)
BLOCKS = """\
  {% if messages %}
    {% set seen = namespace(n=0) %}
{% for m in messages %}{% set seen.n = seen.n + 1 %}{{ seen.n }} {{ m.content }}
  {% endfor %}
  {% endif %}
"""
CHAT = [
    {"role": "user", "content": "  Hi é <b>'\" "},
    {"role": "tool", "content": "x"},
    {"role": "assistant", "content": "So: "},
]
TOOL = {"name": "f", "description": "<é> & 'q'", "parameters": {"b": 1, "a": [True, None]}}


@pytest.mark.slow  # imports transformers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("template", [CHATML, TRIMMING, TOOLS, BLOCKS])
@pytest.mark.parametrize("flags", [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_renders_as_transformers_does(template, flags, tools):
    from transformers.utils.chat_template_utils import render_jinja_template

    is_new, is_continued = flags
    given = {"add_generation_prompt": is_new, "continue_final_message": is_continued}
    (expected,), _ = render_jinja_template(
        [CHAT], chat_template=template, tools=tools, bos_token="<s>", **given
    )
    rendered = render_chat(template, CHAT, tools=tools, variables={"bos_token": "<s>"}, **given)
    assert rendered == expected


def test_chatml():
    assert render_chat(CHATML, CHAT[:1]) == (
        "<|im_start|>system\nBe kind<|im_end|>\n"
        "<|im_start|>user\n  Hi é <b>'\" <|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "end"),
    [pytest.param(CHATML, "So: ", id="kept"), pytest.param(TRIMMING, "So:", id="trimmed")],
)
def test_the_last_message_is_continued_with_the_space_its_template_leaves(template, end):
    text = render_chat(template, CHAT, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith(end)
    assert CHAT[-1] == {"role": "assistant", "content": "So: "}  # the caller's is untouched


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render_chat("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "ab"


def test_a_call_of_a_tool_needs_no_content():
    message = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    template = "{{ messages[0].content is defined }} {{ messages[0].tool_calls[0].name }}"
    assert render_chat(template, [message]) == "False f"


def test_the_date():
    text = render_chat("{{ strftime_now('%Y-%m-%d') }}", CHAT)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", text)


def nested(depth):
    value = "x"
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        pytest.param("hello", "messages is str", id="a string"),
        pytest.param({"role": "user"}, "messages is dict", id="a lone message"),
        pytest.param(None, "messages is NoneType", id="none"),
        pytest.param([], "0 messages", id="empty"),
        pytest.param(["hi"], "message 0 is str", id="strings"),
        pytest.param([{"content": "a"}], "message 0 has no role", id="no role"),
        pytest.param([{"role": 3, "content": "a"}], "message 0 has no role", id="role is a number"),
        pytest.param([{"role": "user"}], "message 0 has no content", id="no content"),
        pytest.param(
            [{"role": "user", "content": None}], "message 0 has no content", id="null content"
        ),
        pytest.param(
            [{"role": "user", "content": 3}], "neither a string nor a list", id="content a number"
        ),
        pytest.param(
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "type 'image_url'",
            id="an image",
        ),
        pytest.param(
            [{"role": "user", "content": [{"type": "text"}]}], "neither a string", id="empty part"
        ),
        pytest.param([{"role": "user", "content": "a", "x": object()}], "a object", id="an object"),
        pytest.param(
            [{"role": "user", "content": "a", "x": nested(10_000)}], "nested too deeply", id="deep"
        ),
    ],
)
def test_malformed_messages(messages, reason):
    with pytest.raises(InvalidRequestError) as error:
        render_chat(CHATML, messages)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        pytest.param("{{ raise_exception('roles must alternate') }}", "roles must", id="own words"),
        pytest.param("{{ messages[0].content + 1 }}", "TypeError", id="wrong types"),
        pytest.param("{{ messages.nothing.more }}", "refuses", id="undefined"),
        pytest.param("{% if %}", "is faulty", id="syntax"),
        pytest.param("{{ ''.__class__.__mro__ }}", "refuses", id="Python's internals"),
        pytest.param("{{ messages.append(1) }}", "refuses", id="changing what it got"),
        pytest.param("{{ tojson.__globals__ }}", "refuses", id="globals of a filter"),
        pytest.param("{{ raise_exception.__globals__['json'] }}", "refuses", id="our globals"),
        pytest.param("{% for i in range(10**9) %}{% endfor %}", "OverflowError", id="long range"),
        pytest.param("{% include 'x' %}", "fails", id="include"),
    ],
)
def test_templates_that_cannot_or_must_not_be_rendered(template, reason):
    with pytest.raises(InvalidRequestError) as error:
        render_chat(template, CHAT)
    assert reason in str(error.value)


def test_output_is_bounded(monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_RENDERED_CHARS", 1000)
    template = "{% for i in range(1000) %}{{ messages[0].content }}{% endfor %}"
    with pytest.raises(InvalidRequestError, match="more than 1000 characters"):
        render_chat(template, CHAT)


@pytest.mark.parametrize(
    ("template", "flags", "reason"),
    [
        pytest.param(
            CHATML, {"add_generation_prompt": True}, "exclude each other", id="both flags"
        ),
        pytest.param("fixed", {"add_generation_prompt": False}, "leaves out", id="not shown"),
    ],
)
def test_continuing_is_refused(template, flags, reason):
    with pytest.raises(InvalidRequestError, match=reason):
        render_chat(template, CHAT, continue_final_message=True, **flags)


# --- through the tokenizer -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "files", "asked", "expected"),
    [
        pytest.param("one {{ bos_token }}", {}, {}, "one <s>", id="the model's own"),
        pytest.param("one", {"chat_template.jinja": "two"}, {}, "two", id="its file comes first"),
        pytest.param("one", {"chat_template.json": '{"chat_template": "3"}'}, {}, "3", id="JSON"),
        pytest.param("one", {}, {"chat_template": "mine"}, "mine", id="the caller's"),
        pytest.param("{{ mood }}", {}, {"mood": "gay"}, "gay", id="the caller's variables"),
        pytest.param(
            [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}],
            {},
            {"tools": [TOOL]},
            "t",
            id="the one for tools",
        ),
        pytest.param(
            [{"name": "default", "template": "d"}, {"name": "rag", "template": "r"}],
            {},
            {"chat_template": "rag"},
            "r",
            id="by name",
        ),
    ],
)
def test_which_template_is_used(tmp_path, config, files, asked, expected):
    directory = saved(
        tmp_path, byte_level(), tokenizer_config={"chat_template": config, "bos_token": "<s>"}
    )
    for name, content in files.items():
        (directory / name).write_text(content)
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.has_chat_template
    assert tokenizer.apply_chat_template(CHAT, **asked) == expected


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        pytest.param(None, "no chat template", id="none"),
        pytest.param([{"name": "a", "template": "x"}], "name one of a", id="no default"),
    ],
)
def test_no_template_to_use(tmp_path, config, reason):
    directory = saved(tmp_path, byte_level(), tokenizer_config={"chat_template": config})
    with pytest.raises(InvalidRequestError, match=reason):
        Tokenizer.from_directory(directory).apply_chat_template(CHAT)


def test_a_damaged_list_of_templates(tmp_path):
    directory = saved(tmp_path, byte_level(), tokenizer_config={"chat_template": [{"name": "a"}]})
    with pytest.raises(ArtifactError, match="no template"):
        Tokenizer.from_directory(directory)
