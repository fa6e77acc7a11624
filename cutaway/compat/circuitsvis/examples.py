"""The example that shows that pictures appear."""

from cutaway.compat.circuitsvis.render import RenderedHTML, shown


def hello(name: str) -> RenderedHTML:
    """Greet somebody."""
    return RenderedHTML(shown([1.0], {"position": [f"Hello {name}"]}, "greeting"))
