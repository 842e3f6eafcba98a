"""Chats, and chat templates of the shapes that models' have: what the one renderer and the apps are tried on."""

from __future__ import annotations

SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "[INST]", "[/INST]", "<pad>", "<unk>"]
# The shapes that models' templates have, each written here from what it does.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "blocks that are trimmed": (
        "{%- for m in messages %}\n    {%- if m.role == 'user' %}\n<user> {{ m.content | trim }}\n    {%- else %}\n"
        "<{{ m.role }}> {{ m.content }}{% endif %}\n  {% if loop.last and add_generation_prompt %}\n<assistant>\n"
        "    {% endif %}\n{%- endfor %}\n"
    ),
    "llama": (
        "{{- bos_token }}\n{%- if not date_string is defined %}{%- if strftime_now is defined %}"
        "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
        "{%- endif %}{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}"
        "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
        "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}\n\n"
        "{%- if tools is not none %}Tools: {% for t in tools %}{{ t | tojson(indent=4) }}\n\n{% endfor %}{%- endif %}"
        "{{ system }}<|eot_id|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{% if m.tool_calls is defined %}{{ m.tool_calls[0].function.arguments | tojson }}{% else %}"
        "{{ m['content'] | trim }}{% endif %}<|eot_id|>{% endfor %}"
        "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
    ),
    "mistral": (
        "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
        "{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}{{- bos_token }}"
        "{%- for m in rest %}{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{- raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{%- endif %}"
        "{%- if m['role'] == 'user' %}{%- if loop.first and system is defined %}"
        "{{- '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}{%- else %}"
        "{{- '[INST] ' + m['content'] + '[/INST]' }}{%- endif %}{%- else %}{{- ' ' + m['content'] + eos_token}}"
        "{%- endif %}{%- endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
        "{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + "
        "message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
    ),
    "qwen3": (
        "{%- if tools %}{{- '<|im_start|>system\n# Tools\n<tools>' }}{%- for tool in tools %}{{- '\n' }}"
        "{{- tool | tojson }}{%- endfor %}{{- '\n</tools><|im_end|>\n' }}{%- endif %}"
        "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}"
        "{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
        "{%- if ns.multi_step_tool and message.role == 'user' %}{%- set ns.multi_step_tool = false %}"
        "{%- set ns.last_query_index = index %}{%- endif %}{%- endfor %}{%- for message in messages %}"
        "{%- if message.role == 'assistant' %}{%- set content = message.content or '' %}"
        "{%- set reasoning = message.reasoning_content or '' %}{%- if '</think>' in content %}"
        "{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
        "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}{{- '<|im_start|>assistant\n' }}"
        "{%- if loop.index0 > ns.last_query_index and (loop.last or reasoning) %}"
        "{{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}{%- endif %}{{- content }}"
        '{%- for call in message.tool_calls or [] %}{{- \'\n<tool_call>\n{"name": "\' + call.function.name + '
        '\'", "arguments": \' + (call.function.arguments if call.function.arguments is string '
        "else call.function.arguments | tojson) + '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}"
        "{%- elif message.role == 'tool' %}"
        "{%- if loop.first or (messages[loop.index0 - 1].role != 'tool') %}{{- '<|im_start|>user' }}{%- endif %}"
        "{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}"
        "{%- if loop.last or (messages[loop.index0 + 1].role != 'tool') %}{{- '<|im_end|>\n' }}{%- endif %}"
        "{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endif %}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
        "{%- endif %}"
    ),
    "zephyr": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
        "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
        "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
    ),
    "deepseek": (
        "{% set ns = namespace(is_first=true, system='') %}{%- for m in messages %}{%- if m['role'] == 'system' %}"
        "{% set ns.system = ns.system + m['content'] %}{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system }}"
        "{%- for m in messages %}{%- if m['role'] == 'user' %}{% set ns.is_first = false %}"
        "{{ '<｜User｜>' + m['content'] }}{%- elif m['role'] == 'assistant' and m['content'] is not none %}"
        "{{ '<｜Assistant｜>' + (m['content'].split('</think>') | last) + eos_token }}{%- endif %}{%- endfor %}"
        "{% if add_generation_prompt and not ns.is_first %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content }}"
        "<|im_end|>{% endgeneration %}\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "macros, loop controls and a filter of HTML": (
        "{% macro turn(m) %}<|{{ m.role }}|>{{ m.content | tojson }}{{ m | tojson(sort_keys=true) }}{% endmacro %}"
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ turn(m) }}"
        "{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}{{ pad_token }}{{ unk_token }}{{ cls_token }}"
        "{{ dict(a=1) | tojson }}{{ documents | length if documents else 'none' }}"
    ),
}
SYSTEM = {"role": "system", "content": " Be <brief> & 'kind'. "}
USER = {"role": "user", "content": "  Grüße, 世界 👨‍👩‍👧‍👦 \n"}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHi </s>"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"ä": [1, None], "b": "<&>"}}}],
}
CHATS = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "many": [USER, ANSWER, USER],
    "alternates badly": [USER, USER],
    "calls": [USER, CALL, {"role": "tool", "name": "f", "content": "3"}, ANSWER, USER],
    "reasons": [USER, {"role": "assistant", "reasoning": "so", "content": "Yes."}, USER, {**ANSWER, "content": "b"}],
    "empty": [{"role": "user", "content": ""}],
}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "naïve <f>", "parameters": {"type": "object"}}}]
