"""HTML pages without a network: charts as escaped markup, put into jinja2 templates."""
