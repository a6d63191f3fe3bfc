"""Names of files that lead elsewhere, or that a system takes for something else; and texts that a browser would run."""

from __future__ import annotations

from urllib.parse import quote

_UP = ["..", "../", "../../", "..\\", "..\\..\\", "....//", "..;/", "./..", "/..", "\\..", ".../...", "..%00/"]
_TARGETS = ["etc/passwd", "secret.safetensors", "Windows\\win.ini"]
_DEVICES = [
    "CON",
    "PRN",
    "AUX",
    "NUL",
    "CLOCK$",
    "CONIN$",
    "CONOUT$",
    "COM1",
    "COM9",
    "LPT1",
    "LPT9",
    "COM\u00b9",
    "LPT\u00b3",
]

_TRAVERSALS = [up * times + target for up in _UP for times in (1, 6) for target in _TARGETS]
_ENCODED = [
    *(quote(name, safe="") for name in ("../../etc/passwd", "..\\..\\x", "/etc/passwd", "C:\\x", "\0")),
    *(
        "%2e%2e%2f",
        "%2e%2e/",
        "..%2f",
        "%252e%252e%252f",
        "..%c0%af",
        "..%ef%bc%8f",
        "%u2216",
        "..%255c",
        "&#46;&#46;/",
    ),
]
_ABSOLUTE = [
    "/", "//", "/etc/passwd", "//server/share/x", "\\\\server\\share\\x", "\\\\?\\C:\\x", "\\\\.\\PhysicalDrive0",
    "C:", "C:\\", "C:x", "c:/x.safetensors", "Z:\\..\\x", "file:///etc/passwd", "http://host/x", "~", "~/x", "~root/x",
    "$HOME/x", "%USERPROFILE%\\x", "${PATH}", "`id`", "$(id)", "; rm -rf x", "| x", "-rf", "--output=/x", "&& x",
]  # fmt: skip
_UNICODE = [
    "\uff0e\uff0e\uff0fx", "\u2024\u2024/x", "..\u2215x", "..\u2044x", "\u2025/x", "..\uff3cx", "..\u29f8x",
    "\u202egnp.x", "x\u200b", "\ufeffx", "\u2066x\u2069", "e\u0301", "\u212b", "\ud800", "x\udfff", "\U0001f600" * 90,
    "\u00e4" * 200, "\u4e2d" * 200, "a\u0300" * 300, "\u0131", "\uff43\uff4f\uff4e", "\u2126", "\ufb01", "x\u00ad",
]  # fmt: skip
_MARKS = [
    "", " ", ".", "..", "...", " .", ". ", "x.", "x ", "x. . .", "\0", "x\0.safetensors", "x.safetensors\0.png", "\n",
    "x\ny", "x\r\ny", "\t", "\x1b[2J", "\x7f", "x:y", "x::$DATA", "x*", "x?", "x|y", "<x>", '"x"', "'x'", "x/y/z",
    "x\\y\\z", ".hidden", ".trash", ".trash/x", "history", "checkpoint-1/adapter", "adapter.safetensors",
    ".safetensors", "x.safetensors.safetensors", "x.png.safetensors", "x" * 300, "x/" * 3000, "../" * 3000 + "x",
    "." * 5000,
]  # fmt: skip

HOSTILE_NAMES = [
    *_TRAVERSALS,
    *_ENCODED,
    *_ABSOLUTE,
    *_UNICODE,
    *_MARKS,
    *(
        spelled
        for device in _DEVICES
        for spelled in (device, device.lower(), f"{device}.safetensors", f"x/{device}.txt")
    ),
]

HOSTILE_TEXTS = [
    "<script>window.xss=1</script>",
    "<img src=x onerror=window.xss=1>",
    "<svg/onload=window.xss=1>",
    "</textarea><script>window.xss=1</script>",
    '"><img src=x onerror="window.xss=1">',
    "' autofocus onfocus='window.xss=1",
    "<iframe srcdoc='<script>parent.xss=1</script>'></iframe>",
    "<details open ontoggle=window.xss=1>",
    "[click](javascript:window.xss=1)",
    "![x](javascript:window.xss=1)",
    "![x](x){onerror=window.xss=1}",
    "<javascript:window.xss=1>",
    "${window.xss=1}",
    "{{constructor.constructor('window.xss=1')()}}",
    "{{{value}}}",
    "$$\\href{javascript:window.xss=1}{x}$$",
    "`</code><script>window.xss=1</script>`",
    "&lt;script&gt;window.xss=1&lt;/script&gt;",
    "<math><mtext></form><form><mglyph><style></math><img src onerror=window.xss=1>",
    "<style>@import 'javascript:window.xss=1'</style>",
    "\u202e<script>window.xss=1</script>",
    "<a href='data:text/html,<script>window.xss=1</script>'>x</a>",
]
