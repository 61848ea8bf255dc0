"""Everything about an adapter: its file, its layers on a base, other tools' layouts."""
