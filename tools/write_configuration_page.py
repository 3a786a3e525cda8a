"""Write docs/configuration.md from the schema and the constructors: `python -m tools.write_configuration_page`."""

from pathlib import Path

from processor.help import configuration_page

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"

if __name__ == "__main__":
    PAGE.write_text(configuration_page(), encoding="utf-8")
    print(f"wrote {PAGE}")
