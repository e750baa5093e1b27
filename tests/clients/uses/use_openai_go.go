// Uses openai for Go: whole, streamed through its accumulator, a schema, a tool that is called, responses, an error.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
	"github.com/openai/openai-go/v3/responses"
	"github.com/openai/openai-go/v3/shared"
)

const model = "smollm2"

var (
	ctx    = context.Background()
	client openai.Client
)

func check(holds bool, values ...any) {
	if !holds {
		panic(fmt.Sprint(values...))
	}
}

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func ask(question string, maxTokens int64) openai.ChatCompletionNewParams {
	return openai.ChatCompletionNewParams{
		Model:       model,
		Messages:    []openai.ChatCompletionMessageParamUnion{openai.UserMessage(question)},
		MaxTokens:   openai.Int(maxTokens),
		Temperature: openai.Float(0),
	}
}

func wholeAndStreamed() {
	whole := must(client.Chat.Completions.New(ctx, ask("What is the capital of France?", 8)))
	text := whole.Choices[0].Message.Content
	check(strings.TrimSpace(text) != "" && whole.Usage.CompletionTokens >= 1, whole.RawJSON())
	options := ask("What is the capital of France?", 8)
	options.StreamOptions = openai.ChatCompletionStreamOptionsParam{IncludeUsage: openai.Bool(true)}
	stream := client.Chat.Completions.NewStreaming(ctx, options)
	accumulator := openai.ChatCompletionAccumulator{}
	for stream.Next() {
		check(accumulator.AddChunk(stream.Current()), "a chunk does not fit the ones before: ", stream.Current().RawJSON())
	}
	check(stream.Err() == nil, stream.Err())
	check(accumulator.Choices[0].Message.Content == text, accumulator.Choices[0].Message.Content, " is not ", text)
	check(accumulator.Usage.CompletionTokens == whole.Usage.CompletionTokens, accumulator.Usage)
}

func schemas() {
	short := map[string]any{"type": "string", "maxLength": 16}
	schema := map[string]any{
		"type":                 "object",
		"properties":           map[string]any{"country": short, "city": short},
		"required":             []string{"country", "city"},
		"additionalProperties": false,
	}
	options := ask("The capital of France is Paris.", 128)
	options.ResponseFormat = openai.ChatCompletionNewParamsResponseFormatUnion{
		OfJSONSchema: &shared.ResponseFormatJSONSchemaParam{
			JSONSchema: shared.ResponseFormatJSONSchemaJSONSchemaParam{
				Name: "capital", Schema: schema, Strict: openai.Bool(true),
			},
		},
	}
	answer := must(client.Chat.Completions.New(ctx, options)).Choices[0].Message.Content
	var capital map[string]string
	check(json.Unmarshal([]byte(answer), &capital) == nil && len(capital) == 2, answer)
}

func tools() {
	options := ask("What is the weather in Paris?", 128)
	options.Tools = []openai.ChatCompletionToolUnionParam{
		openai.ChatCompletionFunctionTool(shared.FunctionDefinitionParam{
			Name:        "weather",
			Description: openai.String("Tell the weather of a city."),
			Parameters: shared.FunctionParameters{
				"type":       "object",
				"properties": map[string]any{"city": map[string]any{"enum": []string{"Paris", "Rome"}}},
				"required":   []string{"city"},
			},
		}),
	}
	options.ToolChoice = openai.ToolChoiceOptionFunctionToolChoice(
		openai.ChatCompletionNamedToolChoiceFunctionParam{Name: "weather"},
	)
	calls := must(client.Chat.Completions.New(ctx, options)).Choices[0].Message.ToolCalls
	check(len(calls) == 1 && calls[0].Function.Name == "weather", calls)
	var arguments struct{ City string }
	check(json.Unmarshal([]byte(calls[0].Function.Arguments), &arguments) == nil, calls[0].Function.Arguments)
	check(arguments.City == "Paris" || arguments.City == "Rome", arguments.City)
}

func respond() {
	answer := must(client.Responses.New(ctx, responses.ResponseNewParams{
		Model:           model,
		Input:           responses.ResponseNewParamsInputUnion{OfString: openai.String("What is the capital of France?")},
		MaxOutputTokens: openai.Int(16),
		Temperature:     openai.Float(0),
	}))
	check(strings.TrimSpace(answer.OutputText()) != "", answer.RawJSON())
}

func errorsNameTheField() {
	options := ask("Hi.", 8)
	options.Temperature = openai.Float(3)
	_, err := client.Chat.Completions.New(ctx, options)
	var refused *openai.Error
	check(errors.As(err, &refused) && refused.StatusCode == 400 && refused.Param == "temperature", err)
}

func main() {
	client = openai.NewClient(
		option.WithBaseURL(os.Args[1]+"/v1"), option.WithAPIKey("none"), option.WithMaxRetries(0),
	)
	models := must(client.Models.List(ctx))
	check(len(models.Data) == 1 && models.Data[0].ID == model, models.RawJSON())
	wholeAndStreamed()
	schemas()
	tools()
	respond()
	errorsNameTheField()
}
