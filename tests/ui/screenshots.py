"""The pictures of docs/web-chat.md, taken of a page that asks a real server: python screenshots.py ADDRESS FOLDER.

Made with: tessella serve --adapter nano-foods=ADAPTER --ui, where ADAPTER is what `tessella demo` taught.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from chat_pages import QUIET


@dataclass(frozen=True)
class Shot:
    name: str
    width_px: int
    height_px: int
    scheme: str
    locale: str
    foods: tuple[tuple[str, str], ...]  # (kind, food) as the page names them
    question: str
    compare: bool


EN, ZH = "What food is in this picture?", "图中是什么食物？"
SHOTS = (
    Shot("wide-light", 1280, 800, "light", "en-US", (("Dishes", "hamburger"), ("Sweets", "doughnut")), EN, True),
    Shot("wide-dark", 1280, 800, "dark", "zh-CN", (("亚洲美食", "寿司"), ("水果", "樱桃")), ZH, True),
    Shot("narrow-light", 390, 844, "light", "zh-CN", (("水果", "菠萝"),), ZH, False),
    Shot("narrow-dark", 390, 844, "dark", "en-US", (("Sweets", "birthday cake"),), EN, True),
)


def take(page: Page, shot: Shot, folder: Path) -> None:
    page.wait_for_function("document.querySelector('#model input')?.value")
    if shot.compare:
        page.evaluate("document.querySelector('#compare input').click()")  # beside the sidebar where that is folded away
    if shot.width_px < 640:
        page.click("#quick summary")
    for kind, food in shot.foods:
        page.locator("#quick .kinds").get_by_role("button", name=kind, exact=True).click()
        page.locator("#quick .strip").get_by_role("button", name=food, exact=True).click()
        page.wait_for_selector("#box .thumbnail-item")
        page.get_by_role("button", name=shot.question).click()
        page.wait_for_selector("#box .thumbnail-item", state="detached")
        page.wait_for_timeout(300)
        page.wait_for_function(QUIET)
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)
    path = folder / f"web-chat-{shot.name}.png"
    page.screenshot(path=path)
    with Image.open(path) as image:  # 128 colours are enough, and a quarter of the bytes
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def main(address: str, folder: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        for shot in SHOTS:
            size = {"width": shot.width_px, "height": shot.height_px}
            page = browser.new_context(viewport=size, color_scheme=shot.scheme, locale=shot.locale).new_page()
            page.set_default_timeout(120_000)
            page.goto(address)
            take(page, shot, folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
