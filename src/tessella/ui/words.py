"""Every word of the page, in English and Chinese.

In: a language and a key.  Out: the text, with its values set in.
"""

LANGUAGES = {"en": "English", "zh": "中文"}

_WORDS: dict[str, tuple[str, str]] = {
    # key: (English, Chinese)
    "chat": ("chat", "对话"),
    "new": ("New conversation", "新对话"),
    "theme": ("Dark or light", "深色 / 浅色"),
    "language": ("Language", "语言"),
    "settings": ("Settings", "设置"),
    "model": ("Model", "模型"),
    "second_model": ("Second model", "第二个模型"),
    "compare": ("Compare two side by side", "并排比较两个模型"),
    "temperature": ("Temperature", "温度"),
    "temperature_info": ("0 takes the likeliest word", "0 表示总取最可能的词"),
    "top_p": ("Top-p", "Top-p"),
    "max_tokens": ("Longest answer, in tokens", "回答的最大长度（token）"),
    "tiles": ("Tiles per picture, at most", "每张图片最多切块数"),
    "tiles_info": ("0: as the model says", "0 表示按模型默认"),
    "seed": ("Seed", "随机种子"),
    "seed_info": ("The same seed gives the same answer; empty: by chance", "相同种子得到相同回答；留空则随机"),
    "system": ("System prompt", "系统提示词"),
    "system_info": ("Empty: the model's own", "留空则用模型自带的"),
    "export": ("Save", "保存"),
    "export_json": ("Conversation (JSON)", "对话（JSON）"),
    "export_row": ("Training sample (JSONL)", "训练样本（JSONL）"),
    "export_row_second": ("Training sample, second model", "训练样本（第二个模型）"),
    "camera": ("Camera", "拍照"),
    "take_picture": ("Take a picture", "拍一张照片"),
    "no_camera": (
        "The browser gives no camera; it may be forbidden, and a page of another machine needs https for it.",
        "浏览器无法使用摄像头：可能被禁止；若页面来自其他机器，需要 https。",
    ),
    "placeholder": ("Ask; drop or paste pictures here", "提问；可拖入或粘贴图片"),
    "upload": ("Show a picture from a file", "从文件选择图片"),
    "submit": ("Ask", "提问"),
    "stop": ("Stop", "停止"),
    "box": ("Your question", "你的问题"),
    "quick": ("Pictures and questions to try", "试试这些图片和问题"),
    "kinds": ("Kinds of pictures", "图片种类"),
    "pictures": ("Pictures", "图片"),
    "questions": ("Questions", "问题"),
    "more": ("and {count} more in the folder", "文件夹中还有 {count} 张"),
    "conversation": ("Conversation", "对话"),
    "empty": (
        "Show it a picture and ask. Pick one below, drop one, paste one, or use the camera.",
        "给它看一张图片，然后提问。可从下方选取、拖入、粘贴，或拍照。",
    ),
    "you": ("You", "你"),
    "copy": ("Copy", "复制"),
    "copied": ("Copied", "已复制"),
    "retry": ("Answer again", "重新回答"),
    "edit": ("Edit and ask again", "修改并重新提问"),
    "undo": ("Take back", "撤回"),
    "correct": ("Correct the answer", "修改回答"),
    "send": ("Ask again", "重新提问"),
    "keep": ("Keep", "保留"),
    "cancel": ("Cancel", "取消"),
    "thinking": ("Answering …", "正在回答……"),
    "stopped": ("stopped", "已停止"),
    "length": ("cut at the longest length", "达到最大长度"),
    "corrected": ("corrected by hand", "已手动修改"),
    "prompt_tokens": ("{count} tokens asked", "提问 {count} token"),
    "answer_tokens": ("{count} answered", "回答 {count} token"),
    "picture_tiles": ("tiles: {count}", "图块 {count}"),
    "first_token": ("first after {seconds} s", "首 token {seconds} 秒"),
    "rate": ("{rate} tokens/s", "{rate} token/秒"),
    "painted": ("A picture that the model drew", "模型画的图"),
    "boxed": ("What the answer marks on {name}", "回答在 {name} 上标出的位置"),
    # the server
    "ready": ("{count} to ask at {url}", "{url} 上有 {count} 个模型"),
    "away": (
        "No server answers at {url}. Start one with: tessella serve MODEL. This page goes on by itself once it is there.",
        "{url} 没有服务器响应。请先启动：tessella serve MODEL。启动后本页会自动恢复。",
    ),
    "cut": (
        "The server went away in the middle of the answer. What came is kept; answer again once it is back.",
        "回答过程中服务器断开。已收到的部分已保留；服务器恢复后可重新回答。",
    ),
    "slow": (
        "The server has sent nothing for {seconds} s. Stop and answer again, or ask something shorter.",
        "服务器 {seconds} 秒没有任何响应。请停止后重试，或缩短问题。",
    ),
    "refused": ("The server says ({status}): {message}", "服务器提示（{status}）：{message}"),
    "odd": (
        "What answers at {url} is no OpenAI-compatible server: {message}. Check the address.",
        "{url} 上的服务不兼容 OpenAI 接口：{message}。请检查地址。",
    ),
    "not_served": (
        "“{name}”, which was to be compared, is not served; there are {names}. Choose two in the settings.",
        "要比较的“{name}”不存在；可用的有 {names}。请在设置中选择两个模型。",
    ),
    # what one can do wrong
    "no_question": (
        "There is no question yet: write one, or press one of the samples.",
        "还没有问题：请输入，或点一个示例问题。",
    ),
    "no_model": ("There is no model to ask: no server answers yet.", "没有可用的模型：服务器尚未响应。"),
    "busy": ("It is still answering; stop it first.", "正在回答；请先停止。"),
    "bad_seed": (
        "The seed is “{seed}”, must be a whole number from 0, or empty.",
        "随机种子“{seed}”无效：请填 0 或更大的整数，或留空。",
    ),
    "nothing_to_save": ("Nothing was said yet, so there is nothing to save.", "还没有对话，没有可保存的内容。"),
    "nothing_to_learn": (
        "No turn has an answer, so there is nothing to learn from; ask something first.",
        "还没有任何回答，无法作为训练样本；请先提问。",
    ),
    "bad_picture": (
        "{name} is no picture that can be opened ({reason}); PNG, JPEG and WebP always can.",
        "无法打开图片 {name}（{reason}）；请使用 PNG、JPEG 或 WebP。",
    ),
    "large_picture": (
        "{name} has {megapixels} megapixels, at most {limit} can be shown; make it smaller first.",
        "{name} 有 {megapixels} 百万像素，最多 {limit}；请先缩小。",
    ),
}

# Sample questions, in the order of the page.
QUESTIONS = {
    "en": ("What food is in this picture?", "Describe the picture.", "What colours do you see?", "How many things are there?"),
    "zh": ("图中是什么食物？", "请描述这张图片。", "图中有哪些颜色？", "图中有几样东西？"),
}


def say(language: str, key: str, **values: object) -> str:
    """The text of key in a language of LANGUAGES."""
    return _WORDS[key][list(LANGUAGES).index(language)].format(**values)


def language_of(accepted: str) -> str:
    """An Accept-Language header -> "zh" where Chinese comes before English, else "en"."""
    for part in accepted.lower().split(","):
        for language in LANGUAGES:
            if part.strip().startswith(language):
                return language
    return "en"
