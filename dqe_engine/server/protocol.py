def http_protocol(settings):
    return "httptools"
