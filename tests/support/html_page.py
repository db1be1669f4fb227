"""A page that the tests read: its tags, what they refer to, and its text."""

from collections.abc import Collection
from html.parser import HTMLParser


class Page(HTMLParser):
    """Tags that are left open, every tag, what they refer to, and the text outside of the tags `hidden`."""

    VOID = ("meta", "path", "polyline", "circle", "rect", "use")

    def __init__(self, text: str, hidden: Collection[str] = ()) -> None:
        super().__init__()
        self.hidden = {*hidden}
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "xlink:href", "srcset", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.hidden & {*self.open}:
            self.text += data
