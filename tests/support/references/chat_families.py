"""Chat templates that behave like those of seven families, and what each writes, spelled out without Jinja.

The templates are our own texts. What matters is kept: which of them begin a text, rewrite earlier turns, drop or open a
reasoning, end the whole text, print a date, ignore the generation prompt, and where tools, calls and results stand.

A reference is a list of (text, trained) segments of a conversation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Messages = list[dict[str, Any]]
Segments = Iterator[tuple[str, bool]]

BOS = "<s>"
EOS = "</s>"
SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>",
    "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|end|>", "<|User|>", "<|Assistant|>",
    "<think>", "</think>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """tools, calls, system: whether its template takes them."""

    template: str
    reference: Callable[..., Segments]
    tools: bool = True
    calls: bool = True
    system: bool = True


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    return [call["function"] for call in message.get("tool_calls", ())]


CHATML = (
    "{%- for tool in tools or [] %}{{- 'TOOL ' + (tool | tojson) + '\n' }}{%- endfor %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}{{- m.content or '' }}"
    "{%- for call in m.tool_calls or [] %}{{- 'CALL ' + (call.function | tojson) }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def chatml(messages: Messages, tools: Any = None, **_: Any) -> Segments:
    yield "".join(f"TOOL {_json(tool)}\n" for tool in tools or ()), False
    for m in messages:
        yield f"<|im_start|>{m['role']}\n", False
        text = (m.get("content") or "") + "".join(f"CALL {_json(call)}" for call in _calls(m))
        yield f"{text}<|im_end|>", m["role"] == "assistant"
        yield "\n", False


LLAMA_3 = (
    "{{- bos_token }}{%- set date = strftime_now('%d %b %Y') %}"
    "{%- if messages[0].role == 'system' %}{%- set said = messages[0].content | trim %}{%- set rest = messages[1:] %}"
    "{%- else %}{%- set said = '' %}{%- set rest = messages %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date + '\n\n' }}"
    "{%- if tools %}{%- for tool in tools %}{{- tool | tojson }}{{- '\n\n' }}{%- endfor %}{%- endif %}"
    "{{- said + '<|eot_id|>' }}"
    "{%- for m in rest %}{%- if m.role == 'tool' %}"
    "{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + (m.content | tojson) + '<|eot_id|>' }}"
    "{%- elif m.tool_calls %}{%- for call in m.tool_calls %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' + (call.function | tojson) + '<|eot_id|>' }}{%- endfor %}"
    "{%- else %}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + (m.content | trim) + '<|eot_id|>' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)


def llama_3(messages: Messages, tools: Any = None, date: str = "", **_: Any) -> Segments:
    def header(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    said, rest = ("", messages)
    if messages[0]["role"] == "system":
        said, rest = messages[0]["content"].strip(), messages[1:]
    yield BOS + header("system") + f"Today Date: {date}\n\n", False
    yield "".join(_json(tool) + "\n\n" for tool in tools or ()) + said + "<|eot_id|>", False
    for m in rest:
        if m["role"] == "tool":
            yield header("ipython") + _json(m["content"]) + "<|eot_id|>", False
        elif m["role"] == "assistant":
            yield header("assistant"), False
            calls = _calls(m)
            yield (_json(calls[0]) if calls else m["content"].strip()) + "<|eot_id|>", True
        else:
            yield header(m["role"]) + m["content"].strip() + "<|eot_id|>", False


GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = m.role %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + (m.content | trim) + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def gemma(messages: Messages, **_: Any) -> Segments:
    yield BOS, False
    for m in messages:
        yield f"<start_of_turn>{'model' if m['role'] == 'assistant' else m['role']}\n", False
        yield m["content"].strip() + "<end_of_turn>", m["role"] == "assistant"
        yield "\n", False


# Drops the reasoning before the last question, and writes an empty one into the last reply that has none.
QWEN_3 = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}"
    "{%- for tool in tools %}{{- tool | tojson }}{{- '\n' }}{%- endfor %}{{- '<|im_end|>\n' }}"
    "{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'user' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{%- elif m.role == 'assistant' %}"
    "{%- set content = m.content or '' %}{%- set thought = m.reasoning_content or '' %}"
    "{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}{{- content }}"
    "{%- for call in m.tool_calls or [] %}"
    "{{- '\n<tool_call>' + call.function.name + ' ' }}"
    "{%- if call.function.arguments is string %}{{- call.function.arguments }}"
    "{%- else %}{{- call.function.arguments | tojson }}{%- endif %}{{- '</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}"
    "{%- elif m.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)


def qwen_3(messages: Messages, tools: Any = None, enable_thinking: bool = True, **_: Any) -> Segments:
    said = messages[0]["content"] if messages[0]["role"] == "system" else None
    if tools:
        head = "" if said is None else said + "\n\n"
        yield f"<|im_start|>system\n{head}{''.join(_json(tool) + chr(10) for tool in tools)}<|im_end|>\n", False
    elif said is not None:
        yield f"<|im_start|>system\n{said}<|im_end|>\n", False
    last = max(i for i, m in enumerate(messages) if m["role"] == "user")
    for i, m in enumerate(messages):
        if m["role"] == "user":
            yield f"<|im_start|>user\n{m['content']}<|im_end|>\n", False
        elif m["role"] == "tool":
            first = messages[i - 1]["role"] != "tool"
            final = i + 1 == len(messages) or messages[i + 1]["role"] != "tool"
            yield ("<|im_start|>user" if first else "") + f"\n<tool_response>\n{m['content']}\n</tool_response>", False
            yield ("<|im_end|>\n" if final else ""), False
        elif m["role"] == "assistant":
            content, thought = m.get("content") or "", m.get("reasoning_content") or ""
            if "</think>" in content:
                thought = content.split("</think>")[0].split("<think>")[-1].strip("\n")
                content = content.split("</think>")[-1].lstrip("\n")
            yield "<|im_start|>assistant\n", False
            if i > last and (i + 1 == len(messages) or thought):
                # Without thinking, an empty reasoning is part of what the model is given.
                given = not enable_thinking and not thought
                yield f"<think>\n{thought}\n</think>\n\n", not given
            for call in _calls(m):
                arguments = call["arguments"]
                text = arguments if isinstance(arguments, str) else _json(arguments)
                content += f"\n<tool_call>{call['name']} {text}</tool_call>"
            yield f"{content}<|im_end|>", True
            yield "\n", False


# Ends the whole text with one token more, unless a reply is asked for.
PHI_35 = (
    "{% for m in messages %}{% if m.role == 'system' and m.content %}{{ '<|system|>\n' + m.content + '<|end|>\n' }}"
    "{% elif m.role == 'user' %}{{ '<|user|>\n' + m.content + '<|end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|assistant|>\n' + m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def phi_35(messages: Messages, **_: Any) -> Segments:
    for m in messages:
        yield f"<|{m['role']}|>\n", False
        yield m["content"] + "<|end|>", m["role"] == "assistant"
        yield "\n", False
    yield EOS, False


# Has no generation prompt; the system prompt stands in the last question, the tools before it.
MISTRAL = (
    "{%- if messages[0].role == 'system' %}{%- set said = messages[0].content %}{%- set rest = messages[1:] %}"
    "{%- else %}{%- set rest = messages %}{%- endif %}"
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in rest %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{{- bos_token }}{%- for m in rest %}"
    "{%- if m.role == 'user' %}"
    "{%- if tools and loop.index0 == ns.last %}{{- 'TOOLS ' + (tools | tojson) }}{%- endif %}"
    "{%- if said is defined and loop.index0 == ns.last %}{{- '[INST] ' + said + '\n\n' + m.content + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + m.content + '[/INST]' }}{%- endif %}"
    "{%- elif m.tool_calls %}{{- '[TOOL_CALLS] [' }}"
    "{%- for call in m.tool_calls %}{{- call.function | tojson }}{{- ', ' if not loop.last else ']' }}{%- endfor %}"
    "{{- eos_token }}"
    "{%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS] ' + (m.content | string) + '[/TOOL_RESULTS]' }}"
    "{%- else %}{{- ' ' + (m.content | trim) + eos_token }}{%- endif %}{%- endfor %}"
)


def mistral(messages: Messages, tools: Any = None, **_: Any) -> Segments:
    said, rest = None, messages
    if messages[0]["role"] == "system":
        said, rest = messages[0]["content"], messages[1:]
    last = max(i for i, m in enumerate(rest) if m["role"] == "user")
    yield BOS, False
    for i, m in enumerate(rest):
        if m["role"] == "user":
            yield f"TOOLS {_json(tools)}" if tools and i == last else "", False
            head = f"{said}\n\n" if said is not None and i == last else ""
            yield f"[INST] {head}{m['content']}[/INST]", False
        elif m["role"] == "tool":
            yield f"[TOOL_RESULTS] {m['content']}[/TOOL_RESULTS]", False
        elif _calls(m):
            yield f"[TOOL_CALLS] {_json(_calls(m))}{EOS}", True
        else:
            yield f" {m['content'].strip()}{EOS}", True


# Never prints the reasoning, opens one in its generation prompt, and writes a reply to a tool without a header.
DEEPSEEK_R1 = (
    "{% set ns = namespace(tool=false, said='') %}"
    "{%- for m in messages %}{%- if m.role == 'system' %}{% set ns.said = m.content %}{%- endif %}{%- endfor %}"
    "{{ bos_token }}{{ ns.said }}"
    "{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- set ns.tool = false -%}{{ '<|User|>' + m.content }}{%- endif %}"
    "{%- if m.role == 'assistant' and m.tool_calls %}{%- set ns.tool = false -%}{{ '<|Assistant|>' }}"
    "{%- for call in m.tool_calls %}{{ 'CALL ' + call.function.name + (call.function.arguments | tojson) }}"
    "{%- endfor %}"
    "{{ eos_token }}"
    "{%- elif m.role == 'assistant' %}"
    "{%- if ns.tool %}{{ 'OUTPUTS END' }}{%- set ns.tool = false -%}{%- else %}{{ '<|Assistant|>' }}{%- endif %}"
    "{{ m.content.split('</think>')[-1] + eos_token }}"
    "{%- elif m.role == 'tool' %}{{ '' if ns.tool else 'OUTPUTS BEGIN' }}{%- set ns.tool = true -%}"
    "{{ 'RESULT ' + m.content }}{%- endif %}{%- endfor -%}"
    "{% if ns.tool %}{{ 'OUTPUTS END' }}{% elif add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)


def deepseek_r1(messages: Messages, **_: Any) -> Segments:
    yield BOS + "".join(m["content"] for m in messages if m["role"] == "system"), False
    after_tool = False
    for m in messages:
        if m["role"] == "user":
            yield "<|User|>" + m["content"], False
        elif m["role"] == "tool":
            yield ("" if after_tool else "OUTPUTS BEGIN") + "RESULT " + m["content"], False
        elif m["role"] == "assistant":
            yield ("OUTPUTS END" if after_tool else "<|Assistant|>"), False
            calls = "".join(f"CALL {call['name']}{_json(call['arguments'])}" for call in _calls(m))
            yield (calls or m["content"].split("</think>")[-1]) + EOS, True
        after_tool = m["role"] == "tool"


FAMILIES = {
    "chatml": Family(CHATML, chatml),
    "llama-3": Family(LLAMA_3, llama_3),
    "gemma": Family(GEMMA, gemma, tools=False, calls=False, system=False),
    "qwen-3": Family(QWEN_3, qwen_3),
    "phi-3.5": Family(PHI_35, phi_35, tools=False, calls=False),
    "mistral": Family(MISTRAL, mistral),
    "deepseek-r1": Family(DEEPSEEK_R1, deepseek_r1, tools=False),
}
