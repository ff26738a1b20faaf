"""Small chat templates of our own, with one mechanism each."""

from __future__ import annotations

_END = "<|end|>\n"
_TOOLS = "{% if tools %}<|tools|>{% for tool in tools %}{{ tool.function.name }};{% endfor %}<|end|>\n{% endif %}"
_CALLS = "{% for call in m.tool_calls or [] %}<|call|>{{ call.function.name }}{% endfor %}"
_BEGIN = "{% for m in messages %}<|{{ m.role }}|>"
_CLOSE = "<|end|>\n{% endfor %}"
_ASK = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
_LAST_USER = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
)


def chat(answer: str = "{{ m.content }}", ask: str = _ASK, before: str = _TOOLS, other: str = "{{ m.content }}") -> str:
    """A template: what an answer is, the generation prompt, what comes first, and what other messages are."""
    body = "{% if m.role == 'assistant' %}" + answer + _CALLS + "{% else %}" + other + "{% endif %}"
    return before + _BEGIN + body + _CLOSE + ask


THINK = "<think>{{ m.reasoning_content }}</think>"
IN_LOOP = "{% if loop.index0 > ns.last %}"

STABLE = chat("{% if m.reasoning_content %}" + THINK + "{% endif %}{{ m.content }}")
GENERATION_PROMPT = chat(ask=_ASK.replace("<|assistant|>", "<|assistant|><think>\n"))
TAG_BETWEEN = chat("<|final|>{{ m.content }}")
REASONING_DROPPED = chat(
    "{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1].strip() }}{% else %}{{ m.content }}{% endif %}"
)
LOOP_REASONING_DROPPED = chat(
    IN_LOOP + "{% if m.reasoning_content %}" + THINK + "{% endif %}{% endif %}{{ m.content }}",
    before=_LAST_USER + _TOOLS,
)
# Reasoning is shown within a tool loop and nowhere else, inline reasoning too: as in most thinking models.
THINKS_IN_LOOPS = chat(
    IN_LOOP
    + "{% if m.reasoning_content %}"
    + THINK
    + "{% endif %}{% endif %}{{ m.content.split('</think>')[-1].strip() }}",
    before=_LAST_USER + _TOOLS,
)
EMPTY_THINKING = chat(
    IN_LOOP + "<think>{{ m.reasoning_content or '' }}</think>{% endif %}{{ m.content }}", before=_LAST_USER + _TOOLS
)
NEWEST_REASONING_ONLY = chat(
    "{% if loop.index0 < ns.newest and '</think>' in m.content %}{{ m.content.split('</think>')[-1].strip() }}"
    "{% else %}{{ m.content }}{% endif %}",
    before="{% set ns = namespace(newest=-1) %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set ns.newest = loop.index0 %}{% endif %}{% endfor %}" + _TOOLS,
)
TOOLS_MOVE = chat(
    before=_LAST_USER,
    other="{% if loop.index0 == ns.last %}" + _TOOLS + "{% endif %}{{ m.content }}",
)
SYSTEM_MOVES = (
    _LAST_USER
    + "{% set lead = messages[0].content if messages[0].role == 'system' else '' %}"
    + _TOOLS
    + "{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>"
    + "{% if loop.index0 == ns.last and lead %}{{ lead }} {% endif %}{{ m.content }}"
    + _CALLS
    + "<|end|>\n{% endif %}{% endfor %}"
    + _ASK
)
DATE = chat(before="Today is {{ strftime_now('%d %B %Y') }}.\n" + _TOOLS)
ANSWERS_STRIPPED = chat("{{ m.content | trim }}")
KEY_ORDER = chat(before=_TOOLS.replace("{{ tool.function.name }}", "{{ tool | tojson }}"))
REFUSES_SYSTEM = chat(
    before="{% if messages[0].role == 'system' %}{{ raise_exception('no system message here') }}{% endif %}" + _TOOLS
)
HISTORY_CHANGED = chat(other="{% if loop.index0 == messages | length - 1 %}NEWEST: {% endif %}{{ m.content }}")
SWITCHED = chat(
    ask=_ASK.replace("<|assistant|>", "<|assistant|>{% if enable_thinking is false %}<think></think>{% endif %}")
)
REFUSES_ALL = "{{ raise_exception('never') }}"
NO_TEMPLATE = "{% for m in messages %}"
