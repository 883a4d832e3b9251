"""Brings pages and plots that live elsewhere in the repository into the site, so that each is kept in one place."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]


def elsewhere() -> dict[str, str]:
    """The site's path of each file, by its path in the repository."""
    plots = [f"results/{path.name}" for path in sorted((ROOT / "results").glob("*.png"))]
    recipes = [path.relative_to(ROOT) for path in sorted((ROOT / "recipes").glob("*/README.md"))]
    return (
        {"CHANGELOG.md": "changelog.md"}
        | {plot: plot for plot in plots}
        | {str(path): f"recipes/{path.parent.name}.md" for path in recipes}
    )


def on_config(config):
    """Adds the recipes' pages to the navigation, under Results."""
    results = next(section["Results"] for section in config["nav"] if "Results" in section)
    for path, target in elsewhere().items():
        if target.startswith("recipes/"):
            title = (ROOT / path).read_text().partition("\n")[0].removeprefix("# ")
            results.append({title: target})
    return config


def on_files(files, config):
    """Adds them to the site."""
    for path, target in elsewhere().items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Leads links to them, and their own links, to where they are in the site."""
    own = {target: path for path, target in elsewhere().items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def to_site(match: re.Match) -> str:
        target, anchor = match[2], match[3] or ""
        if "://" in target or not target:
            return match[0]
        path = str((ROOT / own).parent.joinpath(target).resolve().relative_to(ROOT))
        inside = elsewhere().get(path, path.removeprefix("docs/"))
        up = "../" * page.file.src_uri.count("/")
        return f"{match[1]}({up}{inside}{anchor})"

    return re.sub(r"(\[[^\]]*\])\(([^)#\s]*)(#[^)\s]*)?\)", to_site, markdown)
