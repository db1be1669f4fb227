"""The page at `/` in a real browser, with a real server of a tiny base and adapters of it."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lorasmith.serve
from tests.support.serving import Running, slow

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
browsed = pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
FOLDER = Path(lorasmith.serve.__file__).parent / "page"
CHAT = "**/v1/chat/completions"
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Visit:
    """The page open in a browser of its own; `problems`: what a reader of its console would see."""

    def __init__(self, browser: Any, address: str, **how: Any) -> None:
        self.address, self.asked, self.problems = address, list[Any](), list[str]()
        self.context = browser.new_context(**{"locale": "en-GB", "viewport": {"width": 1200, "height": 800}} | how)
        self.context.set_default_timeout(10_000)
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self.asked.append(request))
        self.page.on("console", lambda line: self.problems.append(line.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector("#app:not([hidden])")

    def send(self, text: str) -> list[str]:
        """Both replies, once they are complete."""
        self.page.fill("#message", text)
        self.page.press("#message", "Enter")
        return self.replies()

    def replies(self) -> list[str]:
        self.page.wait_for_selector(".again")
        return self.texts(".turn:last-child .reply .text")

    def texts(self, selector: str) -> list[str]:
        return [text or "" for text in self.page.locator(selector).all_text_contents()]

    def bodies(self) -> list[dict[str, Any]]:
        """What was asked of the chat's address."""
        return [request.post_data_json for request in self.asked if request.url.endswith("/chat/completions")]

    def intercept(self, handler: Any, addresses: str = CHAT) -> None:
        """Answers instead of the server; loaded anew, since the browser may begin with it only then."""
        self.page.route(addresses, lambda route: handler(route))
        self.page.reload()
        self.page.wait_for_selector("#model-1")

    def shorten(self, tokens: int = 8) -> None:
        self.page.click("#sampling summary")
        self.page.fill("[name=max_tokens]", str(tokens))
        self.page.fill("[name=seed]", "3")
        self.page.click("#sampling summary")


@pytest.fixture
def visit(browser: Any, served: Running) -> Iterator[Any]:
    """Opens the page. In the end: nothing was asked elsewhere, and the console stayed empty."""
    address = f"{served.url}/"
    visits: list[Visit] = []

    def open_page(**how: Any) -> Visit:
        visits.append(Visit(browser, address, **how))
        return visits[-1]

    yield open_page
    for one in visits:
        one.context.close()
        assert [request.url for request in one.asked if not request.url.startswith(address)] == []
        assert one.problems == []


def streamed(text: str) -> dict[str, Any]:
    """An answer with this reply, as page.route gives it."""
    chunk = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": "stop"}]}
    return {"content_type": "text/event-stream", "body": f"data: {json.dumps(chunk)}\r\n\r\ndata: [DONE]\r\n\r\n"}


@browsed
def test_two_models_reply_and_a_refresh_loses_nothing(visit: Any) -> None:
    v = visit()
    v.shorten()
    first = v.send("Why is the sky blue?")
    assert first[0] != first[1]  # of a random model, whose reply may be half a character and so empty
    second = v.send("And at night?")
    base, other = v.bodies()[2:]
    assert base["model"] != other["model"]
    assert base["seed"] == other["seed"]  # only the models differ
    said = [[message["content"].rstrip() for message in body["messages"]] for body in (base, other)]
    assert said == [["Why is the sky blue?", reply.rstrip(), "And at night?"] for reply in first]
    facts = v.texts(".reply .facts")
    assert all(re.search(r"\d+ tokens.*first token after \d+\.\d\d s", fact) for fact in facts), facts
    assert any("tokens/s" in fact for fact in facts)  # but for those that came all at once
    v.page.fill("#message", "a draft")
    v.page.reload()
    v.page.wait_for_selector(".again")
    assert v.texts(".reply .text") == first + second
    assert v.texts(".reply .facts") == facts
    assert v.page.input_value("#message") == "a draft"
    assert v.page.input_value("[name=max_tokens]") == "8"
    v.page.click(".again")
    v.page.wait_for_selector("#send.stop", state="detached")
    assert v.bodies()[-1]["messages"] == other["messages"]
    v.page.once("dialog", lambda dialog: dialog.accept())
    v.page.click("#new")
    v.page.reload()
    assert v.texts(".reply") == []


@browsed
def test_keyboard_alone_is_enough(visit: Any) -> None:
    v = visit()
    page, held = v.page, list[Any]()
    v.intercept(held.append)  # and never answers
    focused = "document.activeElement.id || document.activeElement.tagName"
    assert page.evaluate(focused) == "message"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    page.wait_for_selector("#send.stop")
    assert v.texts("#spoken") == ["Generating replies"]
    page.keyboard.press("Escape")
    assert v.replies() == ["", ""]
    assert all("stopped" in text for text in v.texts(".reply .facts"))
    assert [body["messages"][-1]["content"] for body in v.bodies()] == ["one\ntwo"] * 2
    before = [page.evaluate(focused)]
    for _step in range(10):
        page.keyboard.press("Shift+Tab")
        before.append(page.evaluate(focused))
    replies = ["BUTTON"] * 7  # text, curl and Python of both; answer again
    assert before[::-1] == ["new", "language", "theme", *replies, "message"]
    page.focus("#message")
    after = []
    for _step in range(4):
        page.keyboard.press("Tab")
        after.append(page.evaluate(focused))
    assert after == ["send", "SUMMARY", "model-0", "model-1"]
    named = "[...document.querySelectorAll('button, select, input, textarea')].filter(e => !e.labels?.length)"
    assert page.evaluate(f"{named}.filter(e => !e.ariaLabel && !e.textContent.trim()).map(e => e.outerHTML)") == []


@browsed
def test_a_refresh_in_the_middle_of_a_reply_interrupts_it(
    visit: Any, served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(served, monkeypatch)
    v = visit()
    v.page.fill("#message", "Hi")
    v.page.press("#message", "Enter")
    for reply in v.page.locator(".reply .text").all():
        playwright.expect(reply).not_to_be_empty()
    v.page.reload()
    v.page.wait_for_selector(".again")
    assert v.texts(".note") == ["", ""]
    assert all("interrupted when you left the page" in text for text in v.texts(".reply .facts"))
    assert all(v.texts(".reply .text"))


@browsed
def test_a_model_that_vanished_is_replaced_and_told(visit: Any) -> None:
    models = [{"id": name, "parent": None if name == "base" else "base"} for name in ("base", "first", "second")]
    v = visit()
    v.intercept(lambda route: route.fulfill(json={"data": models}), "**/v1/models")
    v.page.select_option("#model-1", "second")
    v.page.route(CHAT, lambda route: route.fulfill(status=404, json={"error": {"message": "no model 'second'"}}))
    models.pop()
    v.send("Hi")
    playwright.expect(v.page.locator("#notice")).to_have_text(
        "The server no longer has second. first was selected instead."
    )
    assert v.page.input_value("#model-1") == "first"
    assert v.page.locator("#model-1 option").all_text_contents() == ["base", "first"]
    v.problems[:] = [line for line in v.problems if "404" not in line]  # the browser's own lines on these


@browsed
def test_errors_of_the_server_are_in_the_pages_language(visit: Any) -> None:
    said = []
    for locale in ("zh-CN", "en-GB"):
        v = visit(locale=locale)
        v.send("word " * 300)
        said += v.texts(".note")[:1]
        v.problems[:] = [line for line in v.problems if "400" not in line]
    assert [("提示" in text, "tokens" in text) for text in said] == [(True, False), (False, True)], said


@browsed
def test_a_long_message_is_folded(visit: Any) -> None:
    v = visit()
    v.intercept(lambda route: route.fulfill(**streamed("Well.")))
    v.send("word " * 3000)
    ask = v.page.locator(".ask")
    assert ask.bounding_box()["height"] < 250
    assert v.page.evaluate("getComputedStyle(document.querySelector('.ask')).fontWeight") == "400"
    ask.get_by_text("Show all").click()
    assert ask.bounding_box()["height"] > 800
    ask.get_by_text("Show less").click()
    assert ask.bounding_box()["height"] < 250


@browsed
def test_a_system_text_is_sent_first_and_kept(visit: Any) -> None:
    v = visit()
    v.intercept(lambda route: route.fulfill(**streamed("Ahoy.")))
    v.page.click("#sampling summary")
    v.page.fill("[name=system]", "Answer as a pirate.")
    v.send("Hi")
    assert v.bodies()[-1]["messages"] == [
        {"role": "system", "content": "Answer as a pirate."},
        {"role": "user", "content": "Hi"},
    ]
    assert "system text" in v.page.inner_text("#chosen")
    v.page.reload()
    v.page.wait_for_selector("#model-1")
    assert v.page.input_value("[name=system]") == "Answer as a pirate."
    v.page.click("#sampling summary")
    v.page.fill("[name=system]", "")
    v.send("And now?")
    assert [message["role"] for message in v.bodies()[-1]["messages"]] == ["user", "assistant", "user"]


@browsed
def test_an_unfinished_chinese_word_is_not_sent(visit: Any) -> None:
    v = visit()
    v.page.fill("#message", "ni")
    v.page.dispatch_event("#message", "keydown", {"key": "Enter", "isComposing": True})
    assert v.page.input_value("#message") == "ni"
    assert v.bodies() == []


@browsed
def test_language_and_colors(visit: Any) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    v = visit(locale="zh-CN", color_scheme="dark")
    dark = v.page.evaluate(background)
    assert v.texts("#send") == ["发送"]
    v.page.click("#language")
    v.page.select_option("#theme", "light")
    v.page.reload()
    v.page.wait_for_selector("#model-1")
    assert v.texts("#send") == ["Send"]
    assert v.page.get_attribute("html", "lang") == "en"
    assert v.page.evaluate(background) != dark
    assert visit(locale="fr-FR").texts("#send") == ["Send"]


@browsed
def test_a_telephone_shows_it_in_one_column(visit: Any) -> None:
    v = visit(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True, locale="zh-CN")
    v.intercept(lambda route: route.fulfill(**streamed("long" * 100)))
    v.send("w" * 300)
    v.page.click("#sampling summary")
    assert v.page.evaluate("document.documentElement.scrollWidth") <= 360
    left, right = v.page.locator(".reply").all()
    assert left.bounding_box()["y"] + left.bounding_box()["height"] <= right.bounding_box()["y"]


@browsed
def test_what_a_model_says_stays_text(visit: Any) -> None:
    v = visit()
    v.intercept(lambda route: route.fulfill(**streamed(HOSTILE)))
    assert v.send(HOSTILE) == [HOSTILE, HOSTILE]
    v.page.reload()
    assert v.replies() == [HOSTILE, HOSTILE]
    assert v.page.locator("#app img, #app script").count() == 0
    assert v.page.title() == "lorasmith"


@browsed
def test_a_key_is_asked_for_only_where_the_server_wants_one(visit: Any) -> None:
    v = visit()
    assert not v.page.is_visible("#key")
    refusal = {"status": 401, "json": {"error": {"message": "no"}}}

    asks = []

    def guard(route: Any) -> None:
        known = not asks or route.request.headers.get("authorization") == "Bearer good"
        route.continue_() if known else route.fulfill(**refusal)

    v.intercept(guard, "**/v1/**")
    v.shorten()
    asks.append("from now on")
    v.send("Who are you?")
    v.page.fill("#key-text", "bad")
    v.page.press("#key-text", "Enter")
    v.page.wait_for_selector("#notice:not([hidden])")
    v.page.fill("#key-text", "good")
    v.page.press("#key-text", "Enter")
    v.page.wait_for_selector("#key", state="hidden")
    v.page.wait_for_selector(".reply .facts:not(:empty)")
    assert all(v.replies())
    v.page.reload()
    assert not v.page.is_visible("#key")
    assert "good" not in v.page.evaluate("JSON.stringify(localStorage)")
    v.problems[:] = [line for line in v.problems if "401" not in line]  # the browser's own lines on these


@browsed
def test_failures_are_told_in_words(visit: Any) -> None:
    v = visit()
    v.intercept(lambda route: route.fulfill(status=429, headers={"Retry-After": "7"}, json={"error": {}}))
    v.send("Who are you?")
    assert v.texts(".note") == ["The server has too many requests waiting. Try again in 7 s."] * 2
    v.page.unroute(CHAT)
    v.intercept(lambda route: route.fulfill(content_type="text/event-stream", body="data: {}\n\n"))
    v.page.click(".again")
    note = playwright.expect(v.page.locator(".note").first)
    note.to_have_text("The connection was lost before the reply was complete.")
    v.problems[:] = [line for line in v.problems if "429" not in line]


@browsed
def test_what_is_copied_gives_that_reply(visit: Any) -> None:
    v = visit(permissions=["clipboard-read", "clipboard-write"])
    v.shorten()
    base, adapter = v.send('It\'s a "test": 多少钱？ $HOME `x` \\n')
    copied = {}
    for side, name in [(0, "curl"), (1, "Python")]:
        v.page.locator(".reply").nth(side).get_by_text(name, exact=True).click()
        playwright.expect(v.page.locator("#spoken")).to_have_text(f"Copied as {name}")
        copied[name] = v.page.evaluate("navigator.clipboard.readText()")
    ran = subprocess.run([sys.executable, "-c", copied["Python"]], capture_output=True, check=True, timeout=60)
    assert ran.stdout.decode().rstrip() == adapter.rstrip()  # bytes: as text, a reply's \r would become \n
    if shutil.which("curl"):
        ran = subprocess.run(["sh", "-c", copied["curl"] + " -s"], capture_output=True, check=True, timeout=60)
        assert json.loads(ran.stdout)["choices"][0]["message"]["content"].rstrip() == base.rstrip()


def test_both_languages_say_the_same() -> None:
    source = (FOLDER / "texts.js").read_text("utf-8")
    english, chinese = (
        dict(re.findall(r'^  (\w+): "(.*)",$', part, re.MULTILINE)) for part in source.split("const ZH = ")
    )
    assert list(english) == list(chinese)
    holes = re.compile(r"\{\w+\}")
    assert [
        name for name in english if sorted(holes.findall(english[name])) != sorted(holes.findall(chinese[name]))
    ] == []
    used = "".join(path.read_text("utf-8") for path in FOLDER.iterdir() if path.name != "texts.js")
    stems = ("copy_", "chosen_", "other_language")
    assert [name for name in english if f'"{name}"' not in used and not name.startswith(stems)] == []


def test_the_page_makes_no_html_of_text_and_names_no_other_address() -> None:
    for path in FOLDER.iterdir():
        text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")  # a name, never fetched
        found = re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|https?:|//[a-z]+\.", text)
        assert found == [], path.name
