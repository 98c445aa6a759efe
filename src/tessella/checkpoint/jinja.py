"""A family's prompt as the chat template that transformers and other engines render: the same characters as chat.render.

In: a Template, and the bos if prompts begin with one.  Out: the text of chat_template.jinja.
A message's content is a string, where <image> marks a picture, or a list of parts of type "image", "video" or "text".
Pictures in a list are labelled as chat.place_marks does it: one alone has no label, several are "Image-1: ".
"""

from tessella.chat import IMAGE_MARK, ROLES, Template

SLOT = "<IMG_CONTEXT>"  # one for each picture; the processor makes it as many as the picture's tiles need
VIDEO = "<video>"


def chat_template(template: Template, bos: str | None, *, mark: str = SLOT) -> str:
    """bos: the text of the token in front of each prompt, None for none. It is written out, because engines do not add it.

    mark: what stands for a picture in the rendered prompt; engines that open the official layout look for <image> there.
    """
    assert not template.picture_before_bos, "relatives keep their base's own template"
    heads, ends = (
        ", ".join(f"{_quoted(role)}: {_quoted(''.join(part(role)))}" for role in ROLES) for part in (template.head, template.tail)
    )
    slot = mark.join(template.frame)
    return "".join(
        [
            _put(_quoted(bos)) if bos else "",
            f"{{%- set heads = {{{heads}}} -%}}",
            f"{{%- set ends = {{{ends}}} -%}}",
            "{%- set pictures = namespace(seen=0) -%}",
            "{%- if messages[0]['role'] != 'system' -%}",
            _put(f"heads['system'] + {_quoted(template.default_system)} + ends['system']") if template.default_system else "",
            "{%- endif -%}",
            "{%- for message in messages -%}",
            "{%- if message['role'] != 'system' or message['content'] -%}",  # an empty system text leaves its turn out
            _put("heads[message['role']]"),
            "{%- if message['content'] is string -%}",
            "{%- if message['role'] == 'user' -%}",
            _put(f"message['content'] | replace({_quoted(IMAGE_MARK)}, {_quoted(slot)})"),
            "{%- else -%}",
            _put("message['content']"),
            "{%- endif -%}",
            "{%- else -%}",
            _parts(slot),
            "{%- endif -%}",
            _put("ends[message['role']]"),
            "{%- endif -%}",
            "{%- endfor -%}",
            "{%- if add_generation_prompt -%}",
            _put("heads['assistant']"),
            "{%- endif -%}",
        ]
    )


def _parts(slot: str) -> str:
    return "".join(
        [
            "{%- set several = message['content'] | selectattr('type', 'equalto', 'image') | list | length > 1 -%}",
            "{%- for part in message['content'] -%}",
            "{%- if part['type'] == 'image' -%}",
            "{%- set pictures.seen = pictures.seen + 1 -%}",
            "{%- if several or pictures.seen > 1 -%}",
            _put("'Image-' + (pictures.seen | string) + ': '"),
            "{%- endif -%}",
            _put(_quoted(f"{slot}\n")),
            "{%- elif part['type'] == 'video' -%}",
            _put(_quoted(f"{VIDEO}\n")),
            "{%- elif part['type'] == 'text' -%}",
            _put("part['text']"),
            "{%- endif -%}",
            "{%- endfor -%}",
        ]
    )


def _put(expression: str) -> str:
    return f"{{{{- {expression} -}}}}"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
