"""The web chat's page as a test speaks of it: show, ask, press, answer."""

from pathlib import Path
from typing import Any

COUNT_ROUNDS = """() => {
  window.rounds = 0;  // how often everything that was asked has been answered
  new MutationObserver((changes) => {
    for (const change of changes) if (change.oldValue === 'true' && change.target.ariaBusy === 'false') window.rounds += 1;
  }).observe(document.querySelector('.turns'), { attributes: true, attributeOldValue: true, attributeFilter: ['aria-busy'] });
}"""
QUIET = """() => {
  const log = document.querySelector('.turns');
  return log.getAttribute('aria-busy') === 'false' && document.querySelector('#box .submit-button') !== null;
}"""


class Chat:
    """One tab. elsewhere: requests to other hosts; refused: what the page's own policy stopped; faults: errors of scripts."""

    def __init__(self, context: Any, address: str):
        self.context = context
        self.page = context.new_page()
        self.elsewhere: list[str] = []
        self.refused: list[str] = []
        self.faults: list[str] = []
        self.page.set_default_timeout(120_000)  # a busy machine is no fault of the page
        self.page.on("request", lambda request: self._note(request.url))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", lambda said: self.refused.append(said.text) if "Content Security Policy" in said.text else None)
        self.page.goto(address)
        self.page.wait_for_function("document.querySelector('#model input')?.value")
        self.page.evaluate(COUNT_ROUNDS)
        self.rounds = 0

    def _note(self, url: str) -> None:
        if not url.startswith(("http://127.0.0.1:", "data:", "blob:", "http://127.0.0.2:9/")):
            self.elsewhere.append(url)

    def show(self, *pictures: Path) -> None:
        before = self.page.locator("#box .thumbnail-item").count()
        self.page.set_input_files("#box input[type=file]", [str(path) for path in pictures])
        self.shown(before + len(pictures))

    def shown(self, count: int) -> None:
        """Wait until so many pictures are in the box."""
        self.page.wait_for_function(f"document.querySelectorAll('#box .thumbnail-item').length === {count}")

    def ask(self, text: str, wait: bool = True) -> None:
        self.mark()
        self.page.fill("#box textarea", text)
        self.page.keyboard.press("Enter")
        if wait:
            self.done()

    def mark(self) -> None:
        """What done waits for begins here."""
        self.rounds = self.page.evaluate("window.rounds")

    def done(self) -> None:
        """Wait until what was asked since the last mark is answered, by every model."""
        self.page.wait_for_function(f"window.rounds > {self.rounds}")
        self.page.wait_for_function(QUIET)
        self.mark()

    def press(self, name: str, turn: int = -1, column: int = 0) -> None:
        self.mark()
        last = self.page.locator(".turn").nth(turn)
        last.get_by_role("button", name=name).nth(column).click()

    def text(self, turn: int = -1, column: int = 0) -> str:
        return self.page.locator(".turn").nth(turn).locator(".answer").nth(column).locator(".said").inner_text().strip()

    def answer(self) -> str:
        return self.text()

    def facts(self) -> str:
        return self.page.locator(".facts").last.inner_text()

    def tab_to(self, name: str) -> None:
        """Press Tab until the thing of that name has the focus."""
        for _ in range(150):
            self.page.keyboard.press("Tab")
            named = (
                "document.activeElement.getAttribute('aria-label') || document.activeElement.closest('label, button')?.innerText"
            )
            alt = "document.activeElement.querySelector?.('img')?.alt"
            if name in (self.page.evaluate(f"({named} || {alt} || '').trim()"), self.page.evaluate(alt)):
                return
        raise AssertionError(f"no way to {name} by Tab")
