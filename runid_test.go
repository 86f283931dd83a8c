package caddysse

const someToken = "AbCdEfGhIjKlMnOpQrStUg"
