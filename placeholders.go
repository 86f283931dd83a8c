package caddysse

import (
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/caddyserver/caddy/v2"
)

// texts are the settings that take global placeholders, with the placeholders
// replaced.
type texts struct {
	name         string
	cacheControl string
	heartbeat    Heartbeat
}

// replaceGlobals replaces the global placeholders of the configuration. Their
// values must follow the same rules as text that is written out.
func (h *Handler) replaceGlobals() (texts, error) {
	t := texts{name: h.Name, cacheControl: h.CacheControl}
	if h.Heartbeat != nil {
		t.heartbeat = *h.Heartbeat
	}
	replacer := caddy.NewReplacer()
	for _, text := range []struct {
		setting, what string
		value         *string
		valid         func(setting, what, text string) error
	}{
		{"name", "name", &t.name, validateUTF8},
		{"cache_control", "value", &t.cacheControl, validateLine},
		{"heartbeat", "comment", &t.heartbeat.Comment, validateLine},
		{"heartbeat_style", "event name", &t.heartbeat.Event, validateLine},
		{"heartbeat_style", "data", &t.heartbeat.Data, validateLine},
	} {
		replaced, err := replacer.ReplaceOrErr(*text.value, false, false)
		if err != nil {
			return t, fmt.Errorf("sse: %s: the %s %q: %w", text.setting, text.what, *text.value, err)
		}
		if err := text.valid(text.setting, text.what, replaced); err != nil {
			return t, err
		}
		*text.value = replaced
	}
	if h.Heartbeat != nil && h.Heartbeat.Event != "" && t.heartbeat.Event == "" {
		return t, fmt.Errorf("sse: heartbeat_style: the event name %q is empty once its placeholders are replaced", h.Heartbeat.Event)
	}
	return t, nil
}

// validateUTF8 refuses text that can't be a label of a metric.
func validateUTF8(setting, what, text string) error {
	if !utf8.ValidString(text) {
		return fmt.Errorf("sse: %s: the %s %q is not valid UTF-8", setting, what, text)
	}
	return nil
}

// placeholders returns the keys of the placeholders in text, as Caddy finds them.
func placeholders(text string) (keys []string) {
	replacer := caddy.NewEmptyReplacer()
	replacer.Map(func(key string) (any, bool) {
		keys = append(keys, key)
		return nil, false
	})
	replacer.ReplaceKnown(text, "")
	return keys
}

func hasPlaceholder(text string) bool { return len(placeholders(text)) > 0 }

// validateGlobals refuses placeholders of a request: there is no request when a
// configuration is loaded.
func validateGlobals(setting, what, text string) error {
	for _, key := range placeholders(text) {
		if strings.HasPrefix(key, "http.") {
			return fmt.Errorf("sse: %s: the %s has {%s}, which is known for a request only; "+
				"here placeholders are replaced when the configuration is loaded", setting, what, key)
		}
	}
	return nil
}
