"""Reports: text, JSON, CSV and Markdown as strings; nothing here prints."""
