// Package main imports what the scripts use, so that it is compiled when the environment is made.
package main

import (
	_ "github.com/openai/openai-go/v3"
	_ "github.com/openai/openai-go/v3/option"
	_ "github.com/openai/openai-go/v3/responses"
	_ "github.com/openai/openai-go/v3/shared"
)

func main() {}
