"""Texts that try to be markup, to steer a terminal, to forge a line; and a parser of what a page became of them."""

from html.parser import HTMLParser

PAYLOADS = [
    "</script><script>document.title='broken'</script>",
    "<img src=x onerror=\"document.title='broken'\">",
    "</title><svg onload=alert(1)>",
    "\" onmouseover=alert(1) x=\"' autofocus onfocus='",
    "<iframe src=javascript:alert(1)></iframe><meta http-equiv=refresh content='0;url=http://evil'>",
    "\x1b[2J\x1b]0;title\x07\x9b31m\x1b]8;;http://evil\x1b\\link",
    "a\r\n2026 ERROR passk_guard: forged\nline",
    "[bold red]x[/] [link=http://evil]y[/link] {0.__class__} %s {prompt} ${x} {{ 7*7 }} {% raw %}",
    "\u202ereversed\u2066 \x00nul\x7f",
    "<!-- --> ]]> <![CDATA[ &lt;script&gt; &#x3c;script&#x3e;",
]
HOSTILE = (
    "<script>document.title='broken'</script> \"><img src=x onerror=\"document.title='broken'\"> </script> "
    "\x1b[31mred\x1b[0m \u202eesrever\u202c \ud800 & {{ 7*7 }} " + "long " * 60
)
HIDING = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"  # nothing of it may reach a page


class Page(HTMLParser):
    """Every element and attribute of a page, what it links to, what its script and its data blocks hold, other text."""

    def __init__(self, markup):
        super().__init__(convert_charrefs=True)
        self.elements, self.attributes, self.links, self.values = [], set(), [], {}
        self.script, self.blocks, self.text, self._runs = "", [], "", False
        self.feed(markup)
        self.close()

    def handle_starttag(self, name, attributes):
        self.elements.append(name)
        self.attributes |= {key for key, _ in attributes}
        self.values |= dict(attributes)
        self._runs = name == "script" and "type" not in dict(attributes)
        self.links += [value for key, value in attributes if key in ("href", "src", "action", "srcdoc")]

    def handle_data(self, data):
        if self._runs:
            self.script += data
        elif self.lasttag == "script":
            self.blocks.append(data)
        else:
            self.text += data
