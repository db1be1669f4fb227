"""Tools of the project. Their pages are made in both languages, so the texts they begin from are the English ones."""

import os

os.environ["LORASMITH_LANG"] = "en"  # texts of options are made when lorasmith is imported
