"""The ways in which a prompt stops being the prefix of the next one: their names, and what can be done.

A mechanism `breaks` where it costs a cache something in every conversation that has the shape. The others are notes:
they cost when a client does a certain thing (other tools, another order of keys, another engine, another day).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mechanism:
    """A way of breaking. key: in JSON and metrics. cost: of each turn. advice: what one can do."""

    key: str
    title: str
    cost: str
    advice: str
    breaks: bool = True


GENERATION_PROMPT = Mechanism(
    "generation_prompt",
    "generation prompt not in history",
    "the end of the prompt and all generated tokens",
    'The answer was computed behind tokens that the history does not have, so its pages never hit; "save": "auto" '
    "leaves them out. Another value of the thinking switch may be append-only; see the rows of the switch.",
)
TAG_BETWEEN = Mechanism(
    "tag_between",
    "tag between prompt and answer",
    "all generated tokens, unless the model writes that tag itself",
    "The prompt hits whole. The answer hits only if the model itself writes what the template puts before it: compare "
    'one raw answer with the window. "save": "auto" compares each.',
)
BORDER_TOKEN = Mechanism(
    "border_token",
    "token grows across the border",
    "the last token of the prompt and all generated tokens",
    "The text is append-only, but prompt and answer together are cut into other tokens. Pass the generated ids on "
    "instead of text, where the client can.",
)
ANSWER_CHANGED = Mechanism(
    "answer_changed",
    "answer not in history as it was",
    "all generated tokens",
    "The history has another text than the model wrote: send answers back unchanged.",
)
REASONING_DROPPED = Mechanism(
    "reasoning_dropped",
    "reasoning dropped",
    "reasoning and answer of each turn",
    'The prompt hits whole; the answer stood behind its reasoning and never hits: "save": "auto" leaves it out. Where '
    "quality allows, a template option that keeps reasoning makes the chat append-only.",
)
LOOP_REASONING_DROPPED = Mechanism(
    "loop_reasoning_dropped",
    "reasoning of the tool loop dropped",
    "at the next user message, everything since the last one",
    "Within the loop everything hits. When it ends, its pages are dead: let them go first (finish reason, last turn), "
    "and pin the pages before the first call, which live on.",
)
EMPTY_THINKING = Mechanism(
    "empty_thinking",
    "empty thinking blocks come and go",
    "at the next user message, everything since the last one",
    "Blocks without a thought are written in the newest part and left out of the older. A template that writes them "
    "always or never is append-only; until then let a loop's pages go when it ends.",
)
NEWEST_REASONING_ONLY = Mechanism(
    "newest_reasoning_only",
    "only the newest reasoning kept",
    "the reasoning before the last, and all behind it, in each turn",
    "Send answers without their reasoning from the start, or keep all of it by a template option: both append only.",
)
TOOLS_MOVE = Mechanism(
    "tools_move",
    "tool list moves",
    "the tool list and all that follows, in each turn",
    "The list travels with the newest user message. Put tools into the system message by a template of one's own, or "
    "use the model's newer template, which keeps them at the start.",
)
SYSTEM_MOVES = Mechanism(
    "system_moves",
    "system message moves",
    "everything behind its old place, in each turn",
    "Send the instruction as the beginning of the first user message instead.",
)
DATE = Mechanism(
    "date",
    "date or time in the prompt",
    "everything behind it, whenever it changes",
    "Give the template a fixed date by its argument (often date_string), or put the date into the newest user message.",
    breaks=False,
)
ANSWERS_STRIPPED = Mechanism(
    "answers_stripped",
    "answers are stripped",
    "the answer, when the model ends it in white space",
    "Costs only answers with white space at an end. Stop strings that leave none avoid it.",
    breaks=False,
)
KEY_ORDER = Mechanism(
    "key_order",
    "tools in the client's key order",
    "everything behind the tool list, when a client orders keys differently",
    "Sort the keys of tools before the renderer (json.dumps(tools, sort_keys=True) at the gateway), everywhere.",
    breaks=False,
)
TOOLS_FIRST = Mechanism(
    "tools_first",
    "appended tool precedes the conversation",
    "the whole conversation, when a tool is added",
    "Give all tools at a session's start; old tools and what precedes them still hit.",
    breaks=False,
)
ENGINES_DIFFER = Mechanism(
    "engines_differ",
    "front ends differ",
    "everything, when the same conversation goes through another engine",
    "Render in one place, or with one engine and version everywhere; `kvstore router` warns when its replicas differ.",
    breaks=False,
)
SWITCH = Mechanism(
    "thinking_switch",
    "the thinking switch changes the prompt",
    "everything behind it, when a conversation flips it",
    "Keep the switch as it is for a whole conversation.",
    breaks=False,
)
REFUSED = Mechanism(
    "refused",
    "refused",
    "-",
    "The template raises for this shape: such requests fail, or their server renders them by other rules.",
    breaks=False,
)
HISTORY_CHANGED = Mechanism(
    "history_changed",
    "history is rewritten",
    "everything behind the change",
    "See the window: the template writes an earlier message differently once another follows.",
)
# Of clients: what a log or a server sees, beside the above.
SYSTEM_CHANGED = Mechanism(
    "system_changed",
    "client changed the system message",
    "nearly everything",
    "Keep the system message as it is; put what changes (memory, state, retrieved text) into the newest message.",
)
TOOLS_CHANGED = Mechanism(
    "tools_changed",
    "client changed the tools",
    "everything behind the tool list",
    "Give the same tools, in the same order, for a whole session.",
)
HISTORY_EDITED = Mechanism(
    "history_edited",
    "client edited an earlier message",
    "everything behind the edit",
    "Append instead of editing; summaries belong at the end, or begin a new conversation.",
)
HISTORY_CUT = Mechanism(
    "history_cut",
    "client dropped earlier messages",
    "everything behind the first one dropped",
    "Cut rarely and much (by half, say) instead of one message each turn.",
)
TURN_REPEATED = Mechanism(
    "turn_repeated",
    "asked again, or from an earlier turn",
    "nothing that was shared",
    "Nothing to do: a retry or a branch, which shares what it can.",
    breaks=False,
)
TEXT_CHANGED = Mechanism(
    "text_changed",
    "prompt text changed",
    "everything behind the change",
    "See the window; put what changes at the prompt's end.",
)

ALL = tuple(value for value in list(globals().values()) if isinstance(value, Mechanism))
BY_KEY = {mechanism.key: mechanism for mechanism in ALL}
